// The ledger, and the functions by which Python reads it (through ctypes).
#include "ledger.h"

#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

struct Ledger {
    std::mutex turn;
    std::map<std::string, long> counts;
    std::unordered_map<const void*, long> launches;
    std::unordered_map<const void*, std::string> names;
};

// PyTorch registers its kernels before this library's own globals would be there.
Ledger& ledger() {
    static auto* made = new Ledger;
    return *made;
}

using Listener = void (*)(const char* why);
Listener listener = nullptr;

}  // namespace

void note(const std::string& name, long times) {
    std::lock_guard<std::mutex> hold(ledger().turn);
    ledger().counts[name] += times;
}

void note_launch(const void* kernel) {
    std::lock_guard<std::mutex> hold(ledger().turn);
    ledger().launches[kernel]++;
}

void name_kernel(const void* kernel, const char* name) {
    std::lock_guard<std::mutex> hold(ledger().turn);
    ledger().names[kernel] = name;
}

void note_wait(const char* why) {
    note(std::string("wait ") + why);
    if (listener) listener(why);  // without the lock: it may do anything
}

extern "C" {

// Call a function at each wait of the host; a null pointer ends it.
void pretend_on_wait(Listener to) { listener = to; }

// Forget all counts.
void pretend_reset() {
    std::lock_guard<std::mutex> hold(ledger().turn);
    ledger().counts.clear();
    ledger().launches.clear();
}

// Write "TIMES<tab>NAME" lines into a buffer if they fit; return how many bytes they are.
size_t pretend_read(char* buffer, size_t size) {
    std::lock_guard<std::mutex> hold(ledger().turn);
    std::string text;
    for (auto& [kernel, times] : ledger().launches) {
        auto name = ledger().names.find(kernel);
        text += std::to_string(times) + "\tlaunch ";
        text += (name == ledger().names.end() ? "?" : name->second) + "\n";
    }
    for (auto& [name, times] : ledger().counts) text += std::to_string(times) + "\t" + name + "\n";
    if (text.size() < size) memcpy(buffer, text.c_str(), text.size() + 1);
    return text.size();
}
}
