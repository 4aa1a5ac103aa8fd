// What NCCL passes on of small things that the host has written.
#pragma once

#include <cstddef>

// Let the host read at `to` on the card, once, what it wrote at `from`; nothing, if it did not.
void pass_on(const void* from, void* to, size_t bytes);
