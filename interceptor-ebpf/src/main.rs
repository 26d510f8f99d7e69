//! Interceptor's kernel programs: one module for each way that they meet a
//! connection.
//!
//! They gather facts, ask [`interceptor_common::chains`], and carry out the
//! verdict. None runs per packet; each leaves as early as it can. Those of
//! [`connections`] run only when somebody asks.
#![no_std]
#![no_main]
// Inline assembly for BPF; the kernel object needs a compiler that builds core
// from source anyway.
#![feature(asm_experimental_arch)]

mod connections;
mod context;
mod dns;
mod inbound;
mod kernel;
mod listeners;
mod maps;
mod names;
mod origin;
mod outbound;

/// Some helpers are only for programs under the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
