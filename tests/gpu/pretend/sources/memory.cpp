// Memory and copies of the CUDA runtime.
//
// The card's memory is a range of addresses that nobody may touch: code of the host that reads or
// writes it ends with a segmentation fault, as it would on a machine with a card. It holds nothing.
// What is copied out of it is zero; a single byte is one, so that questions (is it finite?) get yes.
// The one exception is what the host wrote and NCCL passed on, which processes compare by.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "card.h"
#include "ledger.h"
#include "passed_on.h"

namespace {

enum Kind { pageable, pinned, on_card };
const char* const kind_names[] = {"pageable", "pinned", "card"};
constexpr size_t staged_bytes = 64 << 10;

struct Range {
    size_t bytes;
    Kind kind;
};

std::mutex turn;
std::map<char*, Range> ranges;  // by where they begin
std::atomic<size_t> used{0};

// Small things that the host copied to the card, and those of them that NCCL passed on; by address.
constexpr size_t small_bytes = 64 << 10;
std::map<const char*, std::string> written, passed;

void* take(size_t bytes, Kind kind) {
    int access = kind == on_card ? PROT_NONE : PROT_READ | PROT_WRITE;
    void* found = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    std::lock_guard<std::mutex> hold(turn);
    ranges[static_cast<char*>(found)] = {bytes, kind};
    return found;
}

size_t forget(void* begin) {
    std::lock_guard<std::mutex> hold(turn);
    auto found = ranges.find(static_cast<char*>(begin));
    if (found == ranges.end()) return 0;
    size_t bytes = found->second.bytes;
    ranges.erase(found);
    return bytes;
}

Kind kind_of(const void* address) {
    auto* at = static_cast<char*>(const_cast<void*>(address));
    std::lock_guard<std::mutex> hold(turn);
    auto after = ranges.upper_bound(at);
    if (after == ranges.begin()) return pageable;
    auto [begin, range] = *--after;
    return at < begin + range.bytes ? range.kind : pageable;
}

void remember(const void* at, const void* from, size_t bytes) {
    if (bytes > small_bytes) return;
    std::lock_guard<std::mutex> hold(turn);
    written[static_cast<const char*>(at)] = std::string(static_cast<const char*>(from), bytes);
}

void carry_along(void* to, const void* from, size_t bytes) {
    std::lock_guard<std::mutex> hold(turn);
    auto* begin = static_cast<const char*>(from);
    auto part = passed.lower_bound(begin);
    if (part == passed.end() || part->first >= begin + bytes) return;
    passed[static_cast<const char*>(to) + (part->first - begin)] = part->second;
}

// Parts that lie beside each other were gathered, and are read at once; each is read once.
void read_back(void* to, const void* from, size_t bytes) {
    memset(to, bytes == 1, bytes);
    std::lock_guard<std::mutex> hold(turn);
    auto* begin = static_cast<const char*>(from);
    for (auto part = passed.lower_bound(begin); part != passed.end() && part->first < begin + bytes;) {
        size_t offset = part->first - begin, size = part->second.size();
        if (offset + size <= bytes) memcpy(static_cast<char*>(to) + offset, part->second.data(), size);
        part = passed.erase(part);
    }
}

// A copy that returns at once waits all the same where one end is pageable memory: out of it small
// ones alone are staged, and into it none is.
void copy(void* to, const void* from, size_t bytes, bool at_once) {
    Kind target = kind_of(to), source = kind_of(from);
    std::string how = std::string(kind_names[source]) + " to " + kind_names[target];
    note("copy " + how);
    note("bytes " + how, bytes);
    bool small = bytes <= staged_bytes;
    if (!at_once) note_wait("cudaMemcpy");
    else if (source == on_card && target == pageable) note_wait("copy to pageable memory");
    else if (source == pageable && target == on_card && !small) note_wait("copy of pageable memory");
    if (target == on_card && source == on_card) carry_along(to, from, bytes);
    else if (target == on_card) remember(to, from, bytes);
    if (target == on_card) return;
    if (source == on_card) read_back(to, from, bytes);
    else memmove(to, from, bytes);
}

}  // namespace

void pass_on(const void* from, void* to, size_t bytes) {
    if (!bytes) return;
    std::lock_guard<std::mutex> hold(turn);
    auto found = written.find(static_cast<const char*>(from));
    if (found == written.end() || found->second.size() < bytes) return;
    auto* begin = static_cast<const char*>(to);
    passed.erase(passed.lower_bound(begin), passed.lower_bound(begin + bytes));
    passed[begin] = found->second.substr(0, bytes);
}

extern "C" {

cudaError_t cudaMalloc(void** to, size_t bytes) {
    *to = nullptr;
    if (!bytes) return cudaSuccess;
    if (used + bytes > bytes_of_card()) return cudaErrorMemoryAllocation;
    used += bytes;
    *to = take(bytes, on_card);
    note("memory cudaMalloc");
    return cudaSuccess;
}
cudaError_t cudaFree(void* begin) {
    if (!begin) return cudaSuccess;
    size_t bytes = forget(begin);
    used -= bytes;
    munmap(begin, bytes);
    note_wait("cudaFree");
    return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** to, size_t bytes, cudaStream_t) { return cudaMalloc(to, bytes); }
cudaError_t cudaFreeAsync(void* begin, cudaStream_t) { return cudaFree(begin); }
cudaError_t cudaMemGetInfo(size_t* left, size_t* all) {
    *all = bytes_of_card();
    *left = *all - used;
    return cudaSuccess;
}

// PRETEND_PINNED_BYTES is the most that one piece of page-locked memory may have.
cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) {
    const char* most = getenv("PRETEND_PINNED_BYTES");
    if (most && bytes > strtoull(most, nullptr, 10)) return cudaErrorMemoryAllocation;
    *to = take(bytes ? bytes : 1, pinned);
    note("memory cudaHostAlloc");
    note("memory bytes of cudaHostAlloc", bytes);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* begin) {
    munmap(begin, forget(begin));
    note_wait("cudaFreeHost");
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void* begin, size_t bytes, unsigned) {
    std::lock_guard<std::mutex> hold(turn);
    ranges[static_cast<char*>(begin)] = {bytes, pinned};
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* begin) {
    forget(begin);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* to, const void* address) {
    constexpr cudaMemoryType types[] = {
        cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
    Kind kind = kind_of(address);
    memset(to, 0, sizeof *to);
    to->type = types[kind];
    if (kind == pinned) to->hostPointer = const_cast<void*>(address);
    if (kind != pageable) to->devicePointer = const_cast<void*>(address);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    copy(to, from, bytes, false);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(
    void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    copy(to, from, bytes, true);
    return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void*, int, const void*, int, size_t, cudaStream_t) {
    note("copy card to other card");
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(
    void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind, cudaStream_t) {
    note("copy of two dimensions");
    return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
    return cudaSuccess;
}
cudaError_t cudaMemset(void*, int, size_t) {
    note("launch cudaMemset");
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) {
    note("launch cudaMemset");
    return cudaSuccess;
}
}
