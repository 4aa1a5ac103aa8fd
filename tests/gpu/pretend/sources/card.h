// The card that is pretended: an H100 of 80 GB, or as many of them as PRETEND_GPUS says, with
// PRETEND_GPU_BYTES of memory each.
#pragma once

#include <cstdlib>

constexpr char card_name[] = "NVIDIA H100 80GB HBM3";
constexpr int compute_major = 9, compute_minor = 0;
constexpr int multiprocessors = 132, threads_a_warp = 32, threads_a_block = 1024;
constexpr int threads_a_multiprocessor = 2048, registers = 65536;
constexpr int shared_a_block = 49152, shared_a_block_asked_for = 232448;
constexpr int shared_a_multiprocessor = 233472, memory_bus_bits = 5120;

inline int number_of_cards() {
    const char* said = getenv("PRETEND_GPUS");
    return said ? atoi(said) : 1;
}

inline size_t bytes_of_card() {
    const char* said = getenv("PRETEND_GPU_BYTES");
    return said ? strtoull(said, nullptr, 10) : size_t(80) << 30;
}

// An attribute of the card by its number, which the runtime and the driver share.
inline int attribute_of_card(int number) {
    switch (number) {
        case 1: return threads_a_block;
        case 8: return shared_a_block;
        case 10: return threads_a_warp;
        case 12: return registers;
        case 13: return 1980000;  // clock, kHz
        case 16: return multiprocessors;
        case 36: return 2619000;  // memory clock, kHz
        case 37: return memory_bus_bits;
        case 39: return threads_a_multiprocessor;
        case 75: return compute_major;
        case 76: return compute_minor;
        case 81: return shared_a_multiprocessor;
        case 82: return registers;
        case 97: return shared_a_block_asked_for;
        case 106: return 32;  // blocks a multiprocessor
        default: return 1;
    }
}
