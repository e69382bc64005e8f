// Written by hand after cabi/include/tailnode.h; tests/header.rs holds the two together.
#![allow(missing_docs)]

use std::ffi::{c_char, c_int, c_void};

pub const TAILNODE_VERSION_MAJOR: i64 = 0;
pub const TAILNODE_VERSION_MINOR: i64 = 1;
pub const TAILNODE_VERSION_PATCH: i64 = 0;

pub const TAILNODE_OK: c_int = 0;
pub const TAILNODE_INTERNAL: c_int = 1;
pub const TAILNODE_INVALID_ARGUMENT: c_int = 2;
pub const TAILNODE_INVALID_STATE: c_int = 3;
pub const TAILNODE_CLOSED: c_int = 4;
pub const TAILNODE_CANCELED: c_int = 5;
pub const TAILNODE_TIMEOUT: c_int = 6;
pub const TAILNODE_AUTH_REFUSED: c_int = 7;
pub const TAILNODE_NEEDS_LOGIN: c_int = 8;
pub const TAILNODE_NEEDS_APPROVAL: c_int = 9;
pub const TAILNODE_KEY_EXPIRED: c_int = 10;
pub const TAILNODE_CONTROL_UNREACHABLE: c_int = 11;
pub const TAILNODE_CONTROL_PROTOCOL: c_int = 12;
pub const TAILNODE_STATE_CORRUPT: c_int = 13;
pub const TAILNODE_STATE_LOCKED: c_int = 14;
pub const TAILNODE_STATE_IO: c_int = 15;
pub const TAILNODE_NOT_TAILNET: c_int = 16;
pub const TAILNODE_NO_SUCH_HOST: c_int = 17;
pub const TAILNODE_UNREACHABLE: c_int = 18;
pub const TAILNODE_REFUSED: c_int = 19;
pub const TAILNODE_RESET: c_int = 20;
pub const TAILNODE_ADDRESS_IN_USE: c_int = 21;
pub const TAILNODE_NOT_FOUND: c_int = 22;
pub const TAILNODE_UNSUPPORTED: c_int = 23;
pub const TAILNODE_EXHAUSTED: c_int = 24;
pub const TAILNODE_PENDING: c_int = 25;
pub const TAILNODE_FORKED: c_int = 26;
pub const TAILNODE_CORE_LOST: c_int = 27;

pub const TAILNODE_ADDR_TEXT: usize = 56;
pub const TAILNODE_FOREVER: i64 = -1;

pub const TAILNODE_IN_PROCESS: u32 = 0;
pub const TAILNODE_ISOLATED: u32 = 1;

pub const TAILNODE_EPHEMERAL: u32 = 1;
pub const TAILNODE_STATE_MEMORY: u32 = 2;
pub const TAILNODE_RESTART: u32 = 4;

pub const TAILNODE_LOG_DEBUG: i32 = -4;
pub const TAILNODE_LOG_INFO: i32 = 0;
pub const TAILNODE_LOG_WARN: i32 = 4;
pub const TAILNODE_LOG_ERROR: i32 = 8;

pub const TAILNODE_NONBLOCK: u32 = 1;
pub const TAILNODE_ACCEPTED_MAGIC: u32 = 0x544e4131;

pub const TAILNODE_EVENT_STATE: u32 = 1;
pub const TAILNODE_EVENT_NETMAP: u32 = 2;
pub const TAILNODE_EVENT_AUTH_URL: u32 = 3;

pub const TAILNODE_STATE_STOPPED: u32 = 0;
pub const TAILNODE_STATE_STARTING: u32 = 1;
pub const TAILNODE_STATE_NEEDS_LOGIN: u32 = 2;
pub const TAILNODE_STATE_NEEDS_APPROVAL: u32 = 3;
pub const TAILNODE_STATE_RUNNING: u32 = 4;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tailnode_error {
    pub code: i32,
    pub sys_errno: i32,
    pub message: [c_char; 504],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct tailnode_addr {
    pub ip: [u8; 16],
    pub port: u16,
    pub family: u8,
    pub reserved: u8,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct tailnode_node {
    pub id: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct tailnode_op {
    pub id: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tailnode_options {
    pub size: usize,
    pub mode: u32,
    pub flags: u32,
    pub dir: *const c_char,
    pub hostname: *const c_char,
    pub auth_key: *const c_char,
    pub control_url: *const c_char,
    pub tags: *const c_char,
    pub root_ca_pem: *const c_char,
    pub helper_path: *const c_char,
    pub port: u32,
    pub log_level: i32,
    pub log_fd: i32,
    pub log: Option<unsafe extern "C" fn(user: *mut c_void, level: c_int, text: *const c_char, len: usize)>,
    pub auth_url: Option<unsafe extern "C" fn(user: *mut c_void, url: *const c_char)>,
    pub user: *mut c_void,
    pub memory_limit: i64,
    pub gc_percent: i32,
    pub max_procs: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct tailnode_accepted {
    pub magic: u32,
    pub remote: tailnode_addr,
    pub local: tailnode_addr,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tailnode_event {
    pub kind: u32,
    pub state: u32,
    pub text_len: u32,
    pub reserved: u32,
    pub text: [c_char; 1008],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tailnode_loopback_info {
    pub size: usize,
    pub address: [c_char; 64],
    pub proxy_credential: [c_char; 64],
    pub local_api_credential: [c_char; 64],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct tailnode_result {
    pub size: usize,
    pub data: *mut c_char,
    pub data_len: usize,
    pub fd: i32,
    pub local: tailnode_addr,
    pub remote: tailnode_addr,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct tailnode_stats {
    pub size: usize,
    pub heap_live: u64,
    pub heap_idle: u64,
    pub heap_returned: u64,
    pub stacks: u64,
    pub other: u64,
    pub total: u64,
    pub memory_limit: u64,
    pub gc_cycles: u64,
    pub gc_pause_total_ns: u64,
    pub gc_pause_max_ns: u64,
    pub gc_cpu_ns: u64,
    pub threads: u64,
    pub goroutines: u64,
    pub max_procs: u64,
    pub nodes: u64,
    pub calls: u64,
    pub calls_in_flight: u64,
    pub connections: u64,
    pub crossings: u64,
    pub pid: i64,
}

extern "C" {
    pub fn tailnode_code_name(code: c_int) -> *const c_char;
    pub fn tailnode_version() -> *const c_char;
    pub fn tailnode_version_number() -> u32;
    pub fn tailnode_free(p: *mut c_void);
    pub fn tailnode_use_core(serve: Option<unsafe extern "C" fn(fd: c_int) -> c_int>) -> c_int;
    pub fn tailnode_addr_format(addr: *const tailnode_addr, buf: *mut c_char, size: usize) -> c_int;
    pub fn tailnode_addr_parse(text: *const c_char, out: *mut tailnode_addr) -> c_int;
    pub fn tailnode_new(opt: *const tailnode_options, out: *mut tailnode_node, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_start(node: tailnode_node, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_up(node: tailnode_node, timeout_ms: i64, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_close(node: tailnode_node, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_status(node: tailnode_node, peers: c_int, json: *mut *mut c_char, len: *mut usize, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_addresses(node: tailnode_node, ip4: *mut tailnode_addr, ip6: *mut tailnode_addr, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_whois(
        node: tailnode_node,
        addr: *const c_char,
        timeout_ms: i64,
        json: *mut *mut c_char,
        len: *mut usize,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_ping(
        node: tailnode_node,
        ip: *const c_char,
        kind: *const c_char,
        timeout_ms: i64,
        json: *mut *mut c_char,
        len: *mut usize,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_dial(
        node: tailnode_node,
        network: *const c_char,
        address: *const c_char,
        flags: u32,
        timeout_ms: i64,
        fd: *mut c_int,
        local: *mut tailnode_addr,
        remote: *mut tailnode_addr,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_listen(
        node: tailnode_node,
        network: *const c_char,
        address: *const c_char,
        flags: u32,
        fd: *mut c_int,
        bound: *mut tailnode_addr,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_accept(
        listener: c_int,
        flags: u32,
        fd: *mut c_int,
        remote: *mut tailnode_addr,
        local: *mut tailnode_addr,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_listen_packet(
        node: tailnode_node,
        network: *const c_char,
        address: *const c_char,
        flags: u32,
        fd: *mut c_int,
        bound: *mut tailnode_addr,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_recvfrom(
        fd: c_int,
        buf: *mut c_void,
        size: usize,
        n: *mut usize,
        from: *mut tailnode_addr,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_sendto(fd: c_int, buf: *const c_void, len: usize, to: *const tailnode_addr, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_watch(node: tailnode_node, flags: u32, fd: *mut c_int, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_read_event(fd: c_int, out: *mut tailnode_event, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_loopback(node: tailnode_node, out: *mut tailnode_loopback_info, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_op_fd(op: tailnode_op) -> c_int;
    pub fn tailnode_op_take(op: tailnode_op, out: *mut tailnode_result, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_op_wait(op: tailnode_op, timeout_ms: i64, out: *mut tailnode_result, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_op_cancel(op: tailnode_op) -> c_int;
    pub fn tailnode_new_start(
        opt: *const tailnode_options,
        node: *mut tailnode_node,
        op: *mut tailnode_op,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_start_start(node: tailnode_node, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_up_start(node: tailnode_node, timeout_ms: i64, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_close_start(node: tailnode_node, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_status_start(node: tailnode_node, peers: c_int, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_addresses_start(node: tailnode_node, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_whois_start(
        node: tailnode_node,
        addr: *const c_char,
        timeout_ms: i64,
        op: *mut tailnode_op,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_ping_start(
        node: tailnode_node,
        ip: *const c_char,
        kind: *const c_char,
        timeout_ms: i64,
        op: *mut tailnode_op,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_dial_start(
        node: tailnode_node,
        network: *const c_char,
        address: *const c_char,
        flags: u32,
        timeout_ms: i64,
        op: *mut tailnode_op,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_listen_start(
        node: tailnode_node,
        network: *const c_char,
        address: *const c_char,
        flags: u32,
        op: *mut tailnode_op,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_listen_packet_start(
        node: tailnode_node,
        network: *const c_char,
        address: *const c_char,
        flags: u32,
        op: *mut tailnode_op,
        err: *mut tailnode_error,
    ) -> c_int;
    pub fn tailnode_watch_start(node: tailnode_node, flags: u32, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_loopback_start(node: tailnode_node, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_runtime_stats_start(node: tailnode_node, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_set_memory_limit_start(node: tailnode_node, bytes: i64, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_set_max_procs_start(node: tailnode_node, n: i32, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_set_gc_percent_start(node: tailnode_node, percent: i32, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_trim_start(node: tailnode_node, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_memory_pressure_start(node: tailnode_node, level: c_int, op: *mut tailnode_op, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_runtime_stats(node: tailnode_node, out: *mut tailnode_stats, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_set_memory_limit(node: tailnode_node, bytes: i64, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_set_max_procs(node: tailnode_node, n: i32, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_set_gc_percent(node: tailnode_node, percent: i32, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_trim(node: tailnode_node, err: *mut tailnode_error) -> c_int;
    pub fn tailnode_memory_pressure(node: tailnode_node, level: c_int, err: *mut tailnode_error) -> c_int;
    /// In the core only: not to be referred to unless the core is linked in.
    pub fn tailnode_core_serve(fd: c_int) -> c_int;
}
