// switch.h: leaves one stack for another
//
//   dwconv_switch(&from, to) stores the caller's stack in `from` and returns into the stack `to`, which another call
//   stored, or which new_stack() prepared. Only registers that a callee must preserve are kept: to the compiler it is
//   a call like any other.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(DWCONV_EMULATOR_UCONTEXT)
#define DWCONV_EMULATOR_UCONTEXT 1
#endif

#ifndef DWCONV_EMULATOR_UCONTEXT

extern "C" void dwconv_switch(void** from, void* to) __attribute__((visibility("hidden")));

#if defined(__x86_64__)
asm(R"(
    .text
    .globl dwconv_switch
    .hidden dwconv_switch
    .type dwconv_switch, @function
dwconv_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size dwconv_switch, .-dwconv_switch
)");

// A stack that starts in `entry`, which never returns: six registers, then the address that `ret` takes.
inline void* new_stack(char* bottom, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(bottom + bytes) & ~uintptr_t(15));
    *--top = nullptr;  // entry finds the stack as after a call: 8 bytes below a multiple of 16
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    return top;
}
#else
asm(R"(
    .text
    .globl dwconv_switch
    .hidden dwconv_switch
    .type dwconv_switch, %function
dwconv_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size dwconv_switch, .-dwconv_switch
)");

inline void* new_stack(char* bottom, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(bottom + bytes) & ~uintptr_t(15)) - 20;
    for (int i = 0; i < 20; ++i) top[i] = nullptr;
    top[11] = reinterpret_cast<void*>(entry);  // x30, the return address
    return top;
}
#endif

#else  // any other processor: slower, by a system call per switch

#include <ucontext.h>

// A context lives at the bottom of its own stack; the scheduler's, which has no stack of ours, is made on first use.
inline void dwconv_switch(void** from, void* to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, static_cast<ucontext_t*>(to));
}
inline void* new_stack(char* bottom, size_t bytes, void (*entry)()) {
    auto* context = reinterpret_cast<ucontext_t*>(bottom);
    getcontext(context);
    context->uc_stack.ss_sp = bottom + sizeof(ucontext_t);
    context->uc_stack.ss_size = bytes - sizeof(ucontext_t);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}

#endif
