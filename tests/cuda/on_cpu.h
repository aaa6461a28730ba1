// Runs CUDA kernels on the CPU, for tests: a C++20 compiler includes it before a .cu file.
//
// One block runs after the other. Its threads are fibers of one host thread that give way only
// where threads of a GPU wait for each other: at barriers and exchanges within a warp. A barrier
// that not all threads reach, or an exchange with a wrong mask, throws. Shared memory begins as
// NaN. A warp runs until all of its threads wait at a barrier, then the next one does.
// SPD_FAST_THREAD_ORDER says in which order warps, and the threads of a warp, run: 0 forwards, 1
// backwards, another number seeds a shuffle. So what a missing barrier between warps breaks, one of
// them shows. Not shown: races between blocks, what depends on a warp's threads running in step,
// and what only warps that take turns between barriers break.
#pragma once

#include <immintrin.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("spd_shared")))
#define SPD_CUDA_ON_CPU

struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
using cudaStream_t = void*;

namespace on_cpu {

constexpr unsigned warp = 32;
constexpr size_t stack_bytes = 64 << 10;
constexpr size_t most_shared = 48 << 10;

// The address sanitizer must know which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                size_t* size);
extern "C" void __asan_unpoison_memory_region(const volatile void* address, size_t size);
extern "C" int __asan_address_is_poisoned(const volatile void* address);
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __asan_unpoison_memory_region(const volatile void*, size_t) {}
inline int __asan_address_is_poisoned(const volatile void*) { return 0; }
#endif

// Saves the registers that a called function must keep, and the stack pointer; goes on with others.
extern "C" void on_cpu_switch(void** from, void* to);
asm(R"(
.text
.weak on_cpu_switch
.type on_cpu_switch, @function
on_cpu_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size on_cpu_switch, .-on_cpu_switch
)");

enum class State { ready, at_barrier, exchanging, done };

struct Fiber {
    void* stack_pointer;
    uint3 thread;
    State state;
    unsigned mask;   // of the exchange that it waits for
    uint64_t value;  // that it brings there
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<std::vector<unsigned>> warps;  // their fibers; both in the order in which they run
    std::vector<char> stacks;
    std::vector<uint64_t> exchanged;  // what the lanes brought to their warp's last exchange
    std::vector<char> dynamic_shared;
    std::function<void()> kernel;
    std::exception_ptr error;
    void* scheduler = nullptr;  // stack pointer
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    unsigned current = 0;
};

inline Block* block = nullptr;  // the one that runs
inline uint3 thread_index{}, block_index{};
inline dim3 grid_size;

[[noreturn]] inline void fail(const std::string& what) {
    const auto number = [](unsigned n) { return std::to_string(n); };
    throw std::runtime_error(what + " in block (" + number(block_index.x) + ", " +
                             number(block_index.y) + ", " + number(block_index.z) + ")");
}

// Back to the scheduler, until what the thread waits for has happened.
inline void wait_as(State state) {
    Fiber& me = block->fibers[block->current];
    me.state = state;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(state == State::done ? nullptr : &fake, block->scheduler_stack,
                                   block->scheduler_stack_size);
    on_cpu_switch(&me.stack_pointer, block->scheduler);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

inline void begin_fiber() {
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_size);
    try {
        block->kernel();
    } catch (...) {
        block->error = std::current_exception();
    }
    wait_as(State::done);
    std::abort();
}

inline void prepare(Block& b) {
    // Frames of the block before were left as they were.
    __asan_unpoison_memory_region(b.stacks.data(), b.stacks.size());
    for (size_t i = 0; i < b.fibers.size(); ++i) {
        const uintptr_t end = reinterpret_cast<uintptr_t>(b.stacks.data()) + (i + 1) * stack_bytes;
        auto* top = reinterpret_cast<uint64_t*>(end & ~uintptr_t(15));
        *--top = 0;  // where a caller would be; keeps the stack aligned as at a call
        *--top = reinterpret_cast<uint64_t>(&begin_fiber);
        for (int registers = 0; registers < 6; ++registers) *--top = 0;
        b.fibers[i].stack_pointer = top;
        b.fibers[i].state = State::ready;
    }
}

inline void resume(Block& b, unsigned i) {
    b.current = i;
    thread_index = b.fibers[i].thread;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, b.stacks.data() + i * stack_bytes, stack_bytes);
    on_cpu_switch(&b.scheduler, b.fibers[i].stack_pointer);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
    if (b.error) std::rethrow_exception(b.error);
}

// Lets a warp's exchange happen once all lanes of its mask wait for it.
inline bool exchange(Block& b, unsigned first) {
    const unsigned last = std::min(first + warp, unsigned(b.fibers.size()));
    unsigned waiting = 0, mask = 0;
    for (unsigned i = first; i < last; ++i)
        if (b.fibers[i].state == State::exchanging) {
            waiting |= 1u << (i - first);
            mask = b.fibers[i].mask;
            if (!(mask >> (i - first) & 1)) fail("a lane is not in its own mask");
        }
    if (!waiting || (waiting & mask) != mask) return false;
    for (unsigned i = first; i < last; ++i)
        if (mask >> (i - first) & 1) {
            if (b.fibers[i].mask != mask) fail("lanes of an exchange have different masks");
            b.fibers[i].state = State::ready;
            b.exchanged[i] = b.fibers[i].value;
        }
    return true;
}

inline void run(Block& b) {
    prepare(b);
    const auto number_in = [&](State state) {
        return std::count_if(b.fibers.begin(), b.fibers.end(),
                             [&](const Fiber& f) { return f.state == state; });
    };
    const auto all = std::ptrdiff_t(b.fibers.size());
    while (number_in(State::done) < all) {
        bool moved = false;
        for (const auto& its : b.warps) {
            for (bool goes_on = true; goes_on;) {
                goes_on = false;
                for (unsigned i : its)
                    if (b.fibers[i].state == State::ready) resume(b, i), goes_on = true;
                goes_on = exchange(b, its[0] / warp * warp) || goes_on;
                moved = moved || goes_on;
            }
        }
        if (number_in(State::at_barrier) == all) {
            for (Fiber& f : b.fibers) f.state = State::ready;
            moved = true;
        }
        if (!moved && number_in(State::done) < all)
            fail("threads wait for a barrier or an exchange that others do not come to");
    }
}

// Shared memory begins as NaN in every block. What the sanitizer keeps between variables goes too.
extern "C" char __start_spd_shared[] __attribute__((weak));
extern "C" char __stop_spd_shared[] __attribute__((weak));
__attribute__((no_sanitize("address"))) inline void forget_shared() {
    for (volatile char* byte = __start_spd_shared; byte < __stop_spd_shared; ++byte) *byte = -1;
}

inline void launch(dim3 grid, dim3 size, size_t shared, std::function<void()> kernel) {
    if (shared > most_shared) throw std::runtime_error("too much shared memory for a launch");
    Block b;
    const unsigned threads = size.x * size.y * size.z;
    b.fibers.resize(threads);
    std::vector<unsigned> fibers(threads);
    b.exchanged.resize((threads + warp - 1) / warp * warp);
    b.stacks.resize(threads * stack_bytes);
    b.kernel = std::move(kernel);
    for (unsigned i = 0; i < threads; ++i) {
        b.fibers[i].thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        fibers[i] = i;
    }
    const char* asked = std::getenv("SPD_FAST_THREAD_ORDER");
    const int order = asked ? std::atoi(asked) : 0;
    if (order == 1) std::reverse(fibers.begin(), fibers.end());
    if (order > 1) std::shuffle(fibers.begin(), fibers.end(), std::mt19937(order));
    for (unsigned i : fibers) {
        const auto its = std::find_if(b.warps.begin(), b.warps.end(), [&](const auto& other) {
            return other[0] / warp == i / warp;
        });
        (its == b.warps.end() ? b.warps.emplace_back() : *its).push_back(i);
    }
    block = &b;
    grid_size = grid;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = {x, y, z};
                b.dynamic_shared.assign(shared, char(0xff));  // a new size: the sanitizer sees it
                b.dynamic_shared.shrink_to_fit();
                forget_shared();
                run(b);
            }
    block = nullptr;
}

inline unsigned lane() { return block->current % warp; }

// What every lane of the warp brought.
inline const uint64_t* bring(unsigned mask, uint64_t value) {
    Fiber& me = block->fibers[block->current];
    me.value = value;
    me.mask = mask;
    wait_as(State::exchanging);
    return block->exchanged.data() + block->current / warp * warp;
}

template <class T>
T value_of_lane(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = bring(mask, bits)[source % warp];
    if (!(mask >> source % warp & 1)) fail("an exchange reads a lane outside its mask");
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace on_cpu

#define threadIdx (on_cpu::thread_index)
#define blockIdx (on_cpu::block_index)
#define gridDim (on_cpu::grid_size)

inline void __syncthreads() { on_cpu::wait_as(on_cpu::State::at_barrier); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
    return on_cpu::value_of_lane(mask, value, source);
}
inline unsigned __ballot_sync(unsigned mask, bool holds) {
    const uint64_t* all = on_cpu::bring(mask, holds);
    unsigned found = 0;
    for (unsigned lane = 0; lane < on_cpu::warp; ++lane)
        found |= unsigned(mask >> lane & all[lane] & 1) << lane;
    return found;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return on_cpu::value_of_lane(mask, value, on_cpu::lane() ^ bits);
}
// 4 of the 8 bytes of two words.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) found |= uint32_t(bytes >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
    return found;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
    return uint32_t((uint64_t(high) << 32 | low) >> by % 32);
}

// What follows is described in csrc/cuda.h.

inline float quick_exp2(float v) { return std::exp2(v); }
inline float quick_inverse(float v) { return 1 / v; }

// A word of which the sanitizer allows no byte is left to it.
inline uint32_t load_word(const uint32_t* from) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(from);
    uint32_t found = 0, allowed = 0;
    for (int i = 0; i < 4; ++i)
        if (!on_cpu::__asan_address_is_poisoned(bytes + i))
            found |= uint32_t(bytes[i]) << 8 * i, ++allowed;
    return allowed ? found : *from;
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t brought[6][on_cpu::warp];
    for (int i = 0; i < 6; ++i) {
        const uint64_t* all = on_cpu::bring(~0u, i < 4 ? a[i] : b[i - 4]);
        std::copy(all, all + on_cpu::warp, brought[i]);
    }
    // Each 32-bit word holds two neighbours along k, the low one first.
    const auto half = [&](int i, int lane, int k) {
        return _cvtsh_ss(uint16_t(brought[i][lane] >> (k % 2 * 16)));
    };
    const int lane = int(on_cpu::lane());
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int member = k % 8 / 2;
            c[i] += half(row / 8 + k / 8 * 2, row % 8 * 4 + member, k) *
                    half(4 + k / 8, column * 4 + member, k);
        }
    }
}

#define SPD_LAUNCH(kernel, grid, threads, shared, stream, ...) \
    ((void)(stream), on_cpu::launch(grid, threads, shared, [=] { kernel(__VA_ARGS__); }))
#define SPD_DYNAMIC_SHARED(T, name) \
    T* const name = reinterpret_cast<T*>(on_cpu::block->dynamic_shared.data())
