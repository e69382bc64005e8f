//! Raw bindings to `libtailnode`, which puts a node of a tailnet inside a program. The [`tailnode`] crate is the one to use;
//! this one mirrors `tailnode.h`, whose comments are the reference for every function.
//!
//! # How the library is found
//!
//! 1. `TAILNODE_LIB_DIR`: a directory with `libtailnode.a` and `libtailnode-core.a` (linked statically, unless
//!    `TAILNODE_LINK=dynamic`), or with `libtailnode.so`.
//! 2. `pkg-config`, package `tailnode` (the shared library), unless `TAILNODE_NO_PKG_CONFIG` is set.
//! 3. Otherwise it is built, statically, from the source that this crate lies in (or `TAILNODE_SRC`): with a C compiler and Go (`GO`, else `go`).
//!
//! With the feature `core` (on by default) the Go core is linked in, where the library is static; [`use_linked_core`] hands it to the library.
//! Without it the program holds no Go at all.
//!
//! [`tailnode`]: https://crates.io/crates/tailnode
#![allow(non_camel_case_types)]

mod bindings;
pub use bindings::*;

/// Makes the statically linked core, where there is one, the one that the library uses. Any number of calls, from any
/// thread, before the first `tailnode_new`.
pub fn use_linked_core() {
    // Safety: both functions are thread-safe, and the core's is what tailnode_use_core is for. A refusal means that a core is in use
    // already, and it can only be this one.
    #[cfg(tailnode_static_core)]
    unsafe {
        tailnode_use_core(Some(tailnode_core_serve));
    }
}
