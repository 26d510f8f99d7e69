//! Empty: a library target lets `interceptor-userspace` depend on this package,
//! so that cargo rebuilds the kernel object when the programs change.
#![no_std]
