// What the pretended card writes down: how often each thing was done, by its name.
#pragma once

#include <cstddef>
#include <string>

// Add to a name. Names are "launch KERNEL", "copy HOW", "bytes HOW", "wait WHY", "memory WHAT".
void note(const std::string& name, long times = 1);

// A kernel of PyTorch is known by an address; its name is looked up when the ledger is read.
void note_launch(const void* kernel);
void name_kernel(const void* kernel, const char* name);

// Note that the host waits for the card here, and call whoever wants to know from where.
void note_wait(const char* why);
