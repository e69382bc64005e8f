//! The Go runtime that runs a node: what it uses, and how much it may use. In process it is one for all nodes of the process; an
//! isolated node has its own, in its helper.
//!
//! These calls wait for one round trip to the core by descriptor: they block no thread.

use std::ffi::c_int;

use tailnode_sys as sys;

use crate::error::Result;
use crate::{op, Node};

/// What the Go runtime uses.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Bytes in live objects and in garbage not yet swept.
    pub heap_live: u64,
    /// Bytes held for the heap and not in use.
    pub heap_idle: u64,
    /// Bytes of address space given back to the system.
    pub heap_returned: u64,
    /// Bytes of goroutine stacks.
    pub stacks: u64,
    /// Bytes of the runtime's own structures.
    pub other: u64,
    /// Bytes that the runtime has from the system now.
    pub total: u64,
    /// Bytes; `None`: no limit.
    pub memory_limit: Option<u64>,
    /// Collections so far.
    pub gc_cycles: u64,
    /// Sum of the pauses.
    pub gc_pause_total_ns: u64,
    /// The longest pause, as the upper bound of its histogram bucket.
    pub gc_pause_max_ns: u64,
    /// CPU time of the collector.
    pub gc_cpu_ns: u64,
    /// Threads that the runtime has made and keeps.
    pub threads: u64,
    /// Goroutines.
    pub goroutines: u64,
    /// How many threads may run Go code at a time.
    pub max_procs: u64,
    /// Open nodes of this core.
    pub nodes: u64,
    /// Requests that the core has served.
    pub calls: u64,
    /// Requests without an answer yet.
    pub calls_in_flight: u64,
    /// Stream descriptors open.
    pub connections: u64,
    /// Calls from C into Go since the core was loaded.
    pub crossings: u64,
    /// The process that runs the core.
    pub pid: i64,
}

type OpPtr = *mut sys::tailnode_op;
type ErrPtr = *mut sys::tailnode_error;

// Safety of this and of all that follow: the library checks the handle, and writes to op and err during the call only.
pub(crate) fn start_stats(node: &Node) -> impl Fn(OpPtr, ErrPtr) -> c_int + use<> {
    let n = node.raw();
    move |op, err| unsafe { sys::tailnode_runtime_stats_start(n, op, err) }
}

/// What the Go runtime that runs `node` uses now.
///
/// # Errors
///
/// [`Closed`](crate::ErrorKind::Closed); [`CoreLost`](crate::ErrorKind::CoreLost).
///
/// # Cancel safety
///
/// This function is cancel safe.
pub async fn stats(node: &Node) -> Result<Stats> {
    Ok(Stats::from_c(&op::run(start_stats(node)).await?.data))
}

impl Stats {
    /// From a tailnode_stats, of which a core that is older may give less.
    pub(crate) fn from_c(b: &[u8]) -> Stats {
        let mut s = sys::tailnode_stats::default();
        let n = b.len().min(size_of_val(&s));
        // Safety: s is a struct of integers, of which n bytes are overwritten.
        unsafe { std::ptr::copy_nonoverlapping(b.as_ptr(), std::ptr::from_mut(&mut s).cast(), n) };
        Stats {
            heap_live: s.heap_live,
            heap_idle: s.heap_idle,
            heap_returned: s.heap_returned,
            stacks: s.stacks,
            other: s.other,
            total: s.total,
            memory_limit: (s.memory_limit < i64::MAX as u64).then_some(s.memory_limit),
            gc_cycles: s.gc_cycles,
            gc_pause_total_ns: s.gc_pause_total_ns,
            gc_pause_max_ns: s.gc_pause_max_ns,
            gc_cpu_ns: s.gc_cpu_ns,
            threads: s.threads,
            goroutines: s.goroutines,
            max_procs: s.max_procs,
            nodes: s.nodes,
            calls: s.calls,
            calls_in_flight: s.calls_in_flight,
            connections: s.connections,
            crossings: s.crossings,
            pid: s.pid,
        }
    }
}

/// Sets a soft limit, in bytes, on the memory of the runtime: nearing it, the collector works harder. `None` takes it away.
///
/// # Errors
///
/// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) for 0, and as [`stats`].
///
/// # Cancel safety
///
/// The limit may be set or not if the future is dropped.
pub async fn set_memory_limit(node: &Node, bytes: Option<u64>) -> Result<()> {
    let bytes = bytes.map_or(i64::MAX, |b| i64::try_from(b).unwrap_or(i64::MAX));
    let node = node.raw();
    op::run(move |op, err| unsafe { sys::tailnode_set_memory_limit_start(node, bytes, op, err) }).await.map(drop)
}

/// Sets how many threads may run Go code at a time.
///
/// # Errors
///
/// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) below 1, and as [`stats`].
///
/// # Cancel safety
///
/// The number may be set or not if the future is dropped.
pub async fn set_max_procs(node: &Node, n: i32) -> Result<()> {
    let node = node.raw();
    op::run(move |op, err| unsafe { sys::tailnode_set_max_procs_start(node, n, op, err) }).await.map(drop)
}

/// Sets how much the heap may grow, in percent of what is live, before the next collection; -1: only the memory limit counts.
///
/// # Errors
///
/// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) below -1, and as [`stats`].
///
/// # Cancel safety
///
/// The percentage may be set or not if the future is dropped.
pub async fn set_gc_percent(node: &Node, percent: i32) -> Result<()> {
    let node = node.raw();
    op::run(move |op, err| unsafe { sys::tailnode_set_gc_percent_start(node, percent, op, err) }).await.map(drop)
}

/// Collects, and gives all memory back to the system that is not in use.
///
/// # Errors
///
/// As [`stats`].
///
/// # Cancel safety
///
/// It goes on if the future is dropped.
pub async fn trim(node: &Node) -> Result<()> {
    let node = node.raw();
    op::run(move |op, err| unsafe { sys::tailnode_trim_start(node, op, err) }).await.map(drop)
}

/// How short the host's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pressure {
    /// Not at all: a limit that [`Pressure::High`] lowered is put back.
    None = 0,
    /// Some: collects.
    Some = 1,
    /// Very: also gives back, and lowers the limit to what is in use plus an eighth.
    High = 2,
}

/// Tells the runtime how short memory is.
///
/// # Errors
///
/// As [`stats`].
///
/// # Cancel safety
///
/// It goes on if the future is dropped.
pub async fn memory_pressure(node: &Node, level: Pressure) -> Result<()> {
    let node = node.raw();
    op::run(move |op, err| unsafe { sys::tailnode_memory_pressure_start(node, level as c_int, op, err) }).await.map(drop)
}
