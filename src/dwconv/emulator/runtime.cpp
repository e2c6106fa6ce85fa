// runtime.cpp: runs the blocks of a launch, a fiber per CUDA thread
//
//   Compiled once, without sanitizers' checks, and linked to every kernel. launch.py calls dwconv_emulator_launch,
//   which calls launch_blocks here: OS threads take blocks from a counter. Within a block one fiber runs at a time. A
//   fiber that waits picks the next one itself and switches to it; the scheduler comes back only when none can run: the
//   block is finished, or its threads wait for each other for ever, which is an error with a sentence.
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "cuda_emulator.h"
#include "fibers.h"

namespace dwconv_emulator {

namespace {

const char* const kCollectiveNames[] = {"__shfl_sync",   "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
                                        "__ballot_sync", "__all_sync",     "__any_sync",       "__syncwarp"};

// Gives the processor to another thread of the block; returns when this one's turn comes.
void wait(Worker& w, Fiber* me) {
    Fiber* next = take_next(w, me->warp);
    switch_fiber(w, me, next ? next : &w.scheduler, false);
}

void release_barrier(Worker& w) {
    Fiber* first = nullptr;
    u32 count = 0, all = 1;
    for (u32 i = 0; i < w.threads; ++i) {
        Fiber& f = w.fibers[i];
        if (!(f.warp->barrier >> f.lane & 1)) continue;
        if (!first) first = &f;
        if (f.line != first->line || f.barrier_kind != first->barrier_kind)
            fail("threads meet at different barriers: thread (%u,%u,%u) at line %d, thread (%u,%u,%u) at line %d",
                 first->index.x, first->index.y, first->index.z, first->line, f.index.x, f.index.y, f.index.z, f.line);
        count += f.value != 0;
        all &= f.value != 0;
    }
    const Barrier kind = first->barrier_kind;
    w.barrier_result = kind == Barrier::kCount ? count : kind == Barrier::kAnd ? all : count != 0;
    w.arrived = 0;
    for (u32 i = 0; i < w.warp_count; ++i) {
        set_ready(w, w.warps[i], w.warps[i].barrier);
        w.warps[i].barrier = 0;
    }
}

// Runs threads one after another on this stack, as long as they don't wait.
void fiber_main() {
    Worker& w = *worker;
#ifdef DWCONV_EMULATOR_ASAN
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!w.scheduler.stack) {  // the first switch of this OS thread came from the scheduler's stack
        w.scheduler.stack = static_cast<char*>(const_cast<void*>(bottom));
        w.scheduler.stack_bytes = bytes;
    }
#endif
    for (;;) {
        w.kernel(w.launch->arguments);
        Fiber* me = static_cast<Fiber*>(self);
        me->sp = nullptr;
        ++w.done;
        if (w.arrived && w.arrived + w.done == w.threads) release_barrier(w);
        Fiber* next = take_next(w, me->warp);
        if (next && !next->sp) {
            next->stack = me->stack;
            // Not null while it runs, so that nobody starts it again.
            next->sp = me->stack;
            self = next;
            continue;
        }
        switch_fiber(w, me, next ? next : &w.scheduler, true);
    }
}

int source_lane(Collective kind, int lane, int parameter, int width) {
    const int first = lane & -width, last = first + width - 1;
    int source = lane;
    if (kind == Collective::kShuffle) source = first + (parameter & (width - 1));
    if (kind == Collective::kShuffleUp) source = unsigned(parameter) > unsigned(lane - first) ? lane : lane - parameter;
    if (kind == Collective::kShuffleDown)
        source = unsigned(parameter) > unsigned(last - lane) ? lane : lane + parameter;
    if (kind == Collective::kShuffleXor) source = lane ^ parameter;
    return kind == Collective::kShuffleXor && source > last ? lane : source;
}

// All lanes of the mask have arrived: computes what each of them gets.
void complete(Worker& w, Warp& warp, u32 mask, Collective kind) {
    Fiber* lanes = &w.fibers[(&warp - w.warps) * 32];
    if (kind >= Collective::kBallot) {
        u32 ballot = 0;
        for (u32 rest = mask; rest; rest &= rest - 1)
            ballot |= u32(lanes[__builtin_ctz(rest)].value != 0) << __builtin_ctz(rest);
        const u32 result = kind == Collective::kBallot ? ballot
                           : kind == Collective::kAll  ? ballot == mask
                                                       : ballot != 0;
        for (u32 rest = mask; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].result = result;
        return;
    }
    for (u32 rest = mask; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        const int source = source_lane(kind, lane, lanes[lane].parameter, lanes[lane].width);
        // A lane that doesn't take part gives poison: a NaN, or -1.
        lanes[lane].result = source >= 0 && (mask >> source & 1) ? lanes[source].value : ~u64(0);
    }
}

bool all_match(const Worker& w, const Warp& warp, u32 mask, const Fiber& me) {
    const Fiber* lanes = &w.fibers[(&warp - w.warps) * 32];
    for (u32 rest = mask; rest; rest &= rest - 1) {
        const Fiber& f = lanes[__builtin_ctz(rest)];
        if (f.mask != mask || f.kind != me.kind || f.line != me.line) return false;
    }
    return true;
}

// Says, for the first warp that is stuck, which lanes wait for what.
void describe_deadlock(Worker& w, char* text, size_t bytes) {
    Warp* warp = w.warps;
    while (!(warp->waiting)) ++warp;
    const u32 number = warp - w.warps;
    size_t used = snprintf(text, bytes, "threads wait for each other for ever in warp %u:", number);
    u32 told = 0;
    for (u32 lane = 0; lane < 32 && used < bytes; ++lane) {
        if (!(warp->members >> lane & 1) || (told >> lane & 1)) continue;
        const Fiber& f = w.fibers[number * 32 + lane];
        const bool waits = warp->waiting >> lane & 1, barrier = warp->barrier >> lane & 1;
        u32 same = 0;
        for (u32 other = lane; other < 32; ++other) {
            const Fiber& g = w.fibers[number * 32 + other];
            if (!(warp->members >> other & 1) || bool(warp->waiting >> other & 1) != waits ||
                bool(warp->barrier >> other & 1) != barrier)
                continue;
            if ((waits || barrier) && g.line != f.line) continue;
            if (waits && (g.kind != f.kind || g.mask != f.mask)) continue;
            same |= 1u << other;
        }
        told |= same;
        if (waits)
            used += snprintf(text + used, bytes - used, " lanes 0x%08x in %s with mask 0x%08x at line %d;", same,
                             kCollectiveNames[int(f.kind)], f.mask, f.line);
        else if (barrier)
            used += snprintf(text + used, bytes - used, " lanes 0x%08x at the barrier at line %d;", same, f.line);
        else
            used += snprintf(text + used, bytes - used, " lanes 0x%08x have returned;", same);
    }
    if (used < bytes) snprintf(text + used, bytes - used, " all lanes of a mask must make the same call");
}

void record(Worker& w, const char* text) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&lock);
    if (!w.launch->message[0]) snprintf(w.launch->message, w.launch->message_bytes, "%s", text);
    pthread_mutex_unlock(&lock);
    w.failed = true;
}

void run_block(Worker& w, u64 number) {
    Block& block = w.block;
    block.index = {u32(number % block.grid.x), u32(number / block.grid.x % block.grid.y),
                   u32(number / block.grid.x / block.grid.y)};
    if (block.shared_bytes) memset(block.shared, 0xff, block.shared_bytes);
    w.random = (w.launch->order_seed + 1) * 0x9e3779b97f4a7c15ull ^ (number + 1) * 0xd1342543de82ef95ull;
    if (!w.random) w.random = 1;
    w.arrived = w.done = w.runnable = 0;
    for (u32 i = 0; i < w.warp_count; ++i) {
        Warp& warp = w.warps[i];
        warp.waiting = warp.barrier = warp.ready = 0;
        set_ready(w, warp, warp.members);
    }
    for (u32 i = 0; i < w.threads; ++i) w.fibers[i].sp = nullptr;

    switch_fiber(w, &w.scheduler, take_next(w, nullptr), false);
    self = nullptr;
    if (!w.failed && w.done != w.threads) {
        char text[1024], where[1200];
        describe_deadlock(w, text, sizeof text);
        snprintf(where, sizeof where, "block (%u,%u,%u): %s", block.index.x, block.index.y, block.index.z, text);
        record(w, where);
    }
    for (u32 i = 0; i < w.threads && !w.failed; ++i)
        if (*reinterpret_cast<u64*>(w.stacks + i * (kStackBytes + kStackColour)) != kCanary)
            record(w, "a thread of the kernel overflowed its stack: its local arrays are too large to be registers");
#ifdef DWCONV_EMULATOR_ASAN
    if (w.failed) __asan_unpoison_memory_region(w.stacks, w.stack_area);  // frames that were abandoned
#endif
}

bool prepare(Worker& w) {
    const Launch& launch = *w.launch;
    w.threads = launch.block[0] * launch.block[1] * launch.block[2];
    w.warp_count = (w.threads + 31) / 32;
    w.block.dim = {launch.block[0], launch.block[1], launch.block[2]};
    w.block.grid = {launch.grid[0], launch.grid[1], launch.grid[2]};
    w.block.shared_bytes = launch.shared_bytes;
    void* shared = nullptr;  // on the heap and of exactly this size, so that AddressSanitizer guards its end
    if (launch.shared_bytes && posix_memalign(&shared, 128, launch.shared_bytes) != 0) return false;
    w.block.shared = static_cast<unsigned char*>(shared);
    w.stack_area = w.threads * (kStackBytes + kStackColour);
    void* area =
        mmap(nullptr, w.stack_area, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) return false;
    w.stacks = static_cast<char*>(area);
    w.fibers = static_cast<Fiber*>(calloc(w.threads, sizeof(Fiber)));
    w.free_stacks = static_cast<char**>(calloc(w.threads, sizeof(char*)));
    if (!w.fibers || !w.free_stacks) return false;
    w.free_count = w.threads;
    for (u32 i = 0; i < w.threads; ++i) {
        w.free_stacks[i] = w.stacks + i * (kStackBytes + kStackColour);  // the highest goes first: it has a neighbour
        memcpy(w.free_stacks[i], &kCanary, sizeof kCanary);
        Fiber& f = w.fibers[i];
        f.index = {i % launch.block[0], i / launch.block[0] % launch.block[1], i / launch.block[0] / launch.block[1]};
        f.block = &w.block;
        f.stack_bytes = kStackBytes;
        f.warp = &w.warps[i / 32];
        f.lane = i % 32;
        f.warp->members |= 1u << f.lane;
    }
    return true;
}

void release(Worker& w) {
    free(w.block.shared);
    free(w.fibers);
    free(w.free_stacks);
    if (w.stacks) munmap(w.stacks, w.stack_area);
}

// The i-th block to run: a shuffled grid is walked with a stride that has no common factor with its size.
u64 block_number(const Launch& launch, u64 i, u64 total) {
    if (!launch.shuffled) return i;
    u64 stride = (launch.order_seed * 2654435761u + total / 2) % total | 1;
    for (;; stride += 2) {
        u64 a = stride, b = total;
        while (b) {
            const u64 rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1) break;
    }
    return u64((static_cast<unsigned __int128>(i) * stride + launch.order_seed) % total);
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

struct Shared {
    Launch* launch;
    void (*kernel)(void* const*);
    double deadline;
};

void* work(void* argument) {
    const Shared& shared = *static_cast<Shared*>(argument);
    Launch& launch = *shared.launch;
    const u64 total = u64(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    Worker w = {};
    w.launch = &launch;
    w.kernel = shared.kernel;
    worker = &w;
    if (!prepare(w)) record(w, "the emulator has no memory for the block's threads: run fewer OS threads");
    while (!w.failed && !__atomic_load_n(&launch.message[0], __ATOMIC_RELAXED) && now() < shared.deadline) {
        const u64 i = __atomic_fetch_add(&launch.next_block, 1, __ATOMIC_RELAXED);
        if (i >= total) break;
        run_block(w, block_number(launch, i, total));
    }
    release(w);
    worker = nullptr;
    return nullptr;
}

}  // namespace

void fail(const char* format, ...) {
    Worker& w = *worker;
    const Fiber& me = *static_cast<Fiber*>(self);
    char text[768], where[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(where, sizeof where, "block (%u,%u,%u), thread (%u,%u,%u): %s", w.block.index.x, w.block.index.y,
             w.block.index.z, me.index.x, me.index.y, me.index.z, text);
    record(w, where);
    switch_fiber(w, static_cast<Fiber*>(self), &w.scheduler, true);
    __builtin_unreachable();
}

u64 collective(Collective kind, u32 mask, u64 value, int parameter, int width, int line) {
    Worker& w = *worker;
    Fiber& me = *static_cast<Fiber*>(self);
    Warp& warp = *me.warp;
    const u32 bit = 1u << me.lane;
    const char* name = kCollectiveNames[int(kind)];
    if (!(mask & bit))
        fail("lane %u calls %s with mask 0x%08x, which doesn't name it (line %d)", me.lane, name, mask, line);
    if (mask & ~warp.members)
        fail("%s with mask 0x%08x names lanes that the block doesn't have: its last warp holds 0x%08x (line %d)", name,
             mask, warp.members, line);
    if (width < 1 || width > 32 || (width & (width - 1)))
        fail("%s with width %d: it must be a power of two up to 32 (line %d)", name, width, line);
    me.kind = kind;
    me.mask = mask;
    me.value = value;
    me.parameter = parameter;
    me.width = width;
    me.line = line;
    warp.waiting |= bit;
    if ((warp.waiting & mask) == mask && all_match(w, warp, mask, me)) {
        complete(w, warp, mask, kind);
        warp.waiting &= ~mask;
        set_ready(w, warp, w.launch->shuffled ? mask : mask & ~bit);
        if (!w.launch->shuffled) return me.result;
    }
    wait(w, &me);
    return me.result;
}

int barrier(Barrier kind, int predicate, int line) {
    Worker& w = *worker;
    Fiber& me = *static_cast<Fiber*>(self);
    me.barrier_kind = kind;
    me.value = predicate != 0;
    me.line = line;
    me.warp->barrier |= 1u << me.lane;
    if (++w.arrived + w.done == w.threads) release_barrier(w);
    wait(w, &me);
    return int(w.barrier_result);
}

int launch_blocks(Launch* launch, void (*kernel)(void* const*)) {
    Shared shared = {launch, kernel, now() + launch->seconds};
    const int others = launch->workers > 1 ? launch->workers - 1 : 0;
    pthread_t* threads = static_cast<pthread_t*>(calloc(others + 1, sizeof(pthread_t)));
    int started = 0;
    while (started < others && pthread_create(&threads[started], nullptr, work, &shared) == 0) ++started;
    work(&shared);
    for (int i = 0; i < started; ++i) pthread_join(threads[i], nullptr);
    free(threads);
    return launch->message[0] != 0;
}

}  // namespace dwconv_emulator
