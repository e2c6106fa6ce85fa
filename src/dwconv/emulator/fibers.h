// fibers.h: the threads of one block as fibers: which of them can run, and the switch from one to another
#pragma once

#include <stddef.h>

#include "cuda_emulator.h"
#include "switch.h"

#ifdef DWCONV_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace dwconv_emulator {

__thread Thread* self;

namespace {

#ifdef DWCONV_EMULATOR_ASAN
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kStackColour = 17 * 64;  // keeps the tops of the stacks out of the same sets of the cache
constexpr size_t kCanaryBytes = 16;
constexpr u64 kCanary = 0xd7c0ffee5afe57acull;

struct Warp {     // a lane that exists and is in none of the other sets runs, or has returned
    u32 members;  // lanes that exist, by bits
    u32 ready;    // could run
    u32 waiting;  // wait in a collective
    u32 barrier;  // wait at a barrier
};

struct Fiber : Thread {
    void* sp;     // null until it starts, and after it has returned
    char* stack;  // its lowest address
    size_t stack_bytes;
    Warp* warp;
    u32 lane;
    Collective kind;  // what it waits for, or did last
    Barrier barrier_kind;
    u32 mask;
    int line, parameter, width;
    u64 value, result;
};

// One OS thread's part of a launch.
struct Worker {
    Launch* launch;
    void (*kernel)(void* const*);
    Block block;
    u32 threads, warp_count;
    Fiber* fibers;
    Warp warps[32];
    u32 runnable;       // warps that have ready lanes, by bits
    u32 arrived, done;  // threads at the barrier; threads that have returned
    u32 barrier_result;
    u64 random;
    char** free_stacks;
    u32 free_count;
    char* stacks;
    size_t stack_area;
    Fiber scheduler;
    bool failed;
};

__thread Worker* worker;  // of this OS thread

u32 random_below(Worker& w, u32 limit) {  // xorshift64*
    w.random ^= w.random >> 12;
    w.random ^= w.random << 25;
    w.random ^= w.random >> 27;
    return u32(((w.random * 0x2545f4914f6cdd1dull) >> 32) * limit >> 32);
}

u32 pick_bit(Worker& w, u32 bits) {
    if (!w.launch->shuffled) return __builtin_ctz(bits);
    for (u32 skip = random_below(w, __builtin_popcount(bits)); skip; --skip) bits &= bits - 1;
    return __builtin_ctz(bits);
}

void set_ready(Worker& w, Warp& warp, u32 lanes) {
    warp.ready |= lanes;
    if (warp.ready) w.runnable |= 1u << (&warp - w.warps);
}

// Takes the next thread to run out of the ready ones; null if there is none.
Fiber* take_next(Worker& w, Warp* current) {
    if (!w.runnable) return nullptr;
    Warp* warp = current;
    if (!warp || !warp->ready || w.launch->shuffled) warp = &w.warps[pick_bit(w, w.runnable)];
    const u32 lane = pick_bit(w, warp->ready);
    warp->ready &= ~(1u << lane);
    if (!warp->ready) w.runnable &= ~(1u << (warp - w.warps));
    return &w.fibers[(warp - w.warps) * 32 + lane];
}

void fiber_main();

// Leaves `from` for `to`. With `for_good`, nothing comes back to `from`.
void switch_fiber(Worker& w, Fiber* from, Fiber* to, bool for_good) {
    if (to == from) return;
    if (!to->sp) {
        to->stack = w.free_stacks[--w.free_count];
        to->sp = new_stack(to->stack + kCanaryBytes, kStackBytes - kCanaryBytes, fiber_main);
    }
    if (for_good && from != &w.scheduler) w.free_stacks[w.free_count++] = from->stack;
    self = to;
#ifdef DWCONV_EMULATOR_ASAN
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, to->stack, to->stack_bytes);
#endif
    void* unused;
    dwconv_switch(for_good ? &unused : &from->sp, to->sp);
#ifdef DWCONV_EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

}  // namespace
}  // namespace dwconv_emulator
