//! The bindings against the header: a C compiler sees every constant, layout and prototype that src/bindings.rs states.

use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use tailnode_sys::*;

const BINDINGS: &str = include_str!("../src/bindings.rs");

fn field_size<S, F>(_: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! layout {
    ($out:expr, $($name:ident { $($field:ident),* })*) => {$({
        writeln!($out, "_Static_assert(sizeof({0}) == {1}, \"size of {0}\");", stringify!($name), size_of::<$name>()).unwrap();
        $(
            writeln!($out, "_Static_assert(offsetof({0}, {1}) == {2} && sizeof((({0} *)0)->{1}) == {3}, \"{0}.{1}\");",
                stringify!($name), stringify!($field), offset_of!($name, $field), field_size::<$name, _>(|s| &s.$field)).unwrap();
        )*
    })*};
}

/// A Rust type of the bindings as C.
fn c_type(t: &str) -> String {
    if let Some(t) = t.strip_prefix("*mut ") {
        return format!("{} *", c_type(t));
    }
    if let Some(t) = t.strip_prefix("*const ") {
        return format!("const {} *", c_type(t));
    }
    match t {
        "c_int" => "int",
        "c_char" => "char",
        "c_void" => "void",
        "u32" => "uint32_t",
        "i32" => "int32_t",
        "u64" => "uint64_t",
        "i64" => "int64_t",
        "usize" => "size_t",
        "" => "void",
        t if t.starts_with("tailnode_") => t,
        t => panic!("a type that this test does not know: {t}"),
    }
    .into()
}

/// The functions of the bindings as C prototypes, with their names.
fn prototypes() -> Vec<(String, String)> {
    let block = BINDINGS.split("extern \"C\" {").last().unwrap();
    let mut all = Vec::new();
    for f in block.split("pub fn ").skip(1) {
        let f: String = f.split(';').next().unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        let (name, rest) = f.split_once('(').unwrap();
        if name == "tailnode_use_core" {
            all.push((name.into(), "extern int tailnode_use_core(int (*serve)(int fd));".into()));
            continue;
        }
        let (args, ret) = rest.rsplit_once(')').unwrap();
        let args: Vec<_> =
            args.split(',').map(str::trim).filter(|a| !a.is_empty()).map(|a| c_type(a.split_once(':').unwrap().1.trim())).collect();
        let args = if args.is_empty() { "void".into() } else { args.join(", ") };
        let ret = c_type(ret.trim().trim_start_matches("->").trim());
        all.push((name.into(), format!("extern {ret} {name}({args});")));
    }
    all
}

fn constants() -> Vec<(&'static str, &'static str)> {
    BINDINGS
        .lines()
        .filter_map(|l| l.strip_prefix("pub const "))
        .map(|l| {
            let (name, rest) = l.split_once(':').unwrap();
            (name, rest.split_once('=').unwrap().1.trim().trim_end_matches(';'))
        })
        .collect()
}

#[test]
fn bindings_match_the_header() {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cabi/include");
    let header = std::fs::read_to_string(include.join("tailnode.h")).expect("the header lies in the same checkout");

    let mut c = String::from("#include \"tailnode.h\"\n");
    layout!(c,
        tailnode_error { code, sys_errno, message }
        tailnode_addr { ip, port, family, reserved }
        tailnode_node { id }
        tailnode_op { id }
        tailnode_options { size, mode, flags, dir, hostname, auth_key, control_url, tags, root_ca_pem, helper_path, port, log_level, log_fd,
            log, auth_url, user, memory_limit, gc_percent, max_procs }
        tailnode_accepted { magic, remote, local }
        tailnode_event { kind, state, text_len, reserved, text }
        tailnode_loopback_info { size, address, proxy_credential, local_api_credential }
        tailnode_result { size, data, data_len, fd, local, remote }
        tailnode_stats { size, heap_live, heap_idle, heap_returned, stacks, other, total, memory_limit, gc_cycles, gc_pause_total_ns,
            gc_pause_max_ns, gc_cpu_ns, threads, goroutines, max_procs, nodes, calls, calls_in_flight, connections, crossings, pid }
    );
    for (name, value) in constants() {
        writeln!(c, "_Static_assert({name} == {value}, \"{name}\");").unwrap();
    }
    // A second declaration that is not compatible with the header's is an error.
    for (_, p) in prototypes() {
        writeln!(c, "{p}").unwrap();
    }

    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = dir.join("header.c");
    std::fs::write(&source, &c).unwrap();
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let out = Command::new(cc)
        .args(["-std=gnu11", "-Wall", "-Werror", "-fsyntax-only", "-I"])
        .arg(&include)
        .arg(&source)
        .output()
        .expect("a C compiler runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));

    // And nothing of the header is missing here.
    let ours: Vec<String> = prototypes().into_iter().map(|p| p.0).collect();
    for p in header.split("TAILNODE_API ").skip(1) {
        let Some((head, _)) = p.split_once('(') else { continue };
        let name = head.rsplit(|ch: char| ch != '_' && !ch.is_alphanumeric()).next().unwrap();
        if name.starts_with("tailnode_") {
            assert!(ours.iter().any(|o| o == name), "the bindings lack {name}");
        }
    }
    let known: Vec<&str> = constants().into_iter().map(|k| k.0).collect();
    for line in header.lines() {
        let line = line.trim();
        let name = match line.strip_prefix("#define ") {
            Some(d) => d.split(|ch: char| ch.is_whitespace() || ch == '(').next().unwrap(),
            None if line.starts_with("TAILNODE_") && line.contains(" = ") => line.split(' ').next().unwrap(),
            None => continue,
        };
        if !["TAILNODE_H", "TAILNODE_API", "TAILNODE_VERSION_NUMBER", "TAILNODE_OPTIONS_INIT"].contains(&name) {
            assert!(known.contains(&name), "the bindings lack {name}");
        }
    }
}

#[test]
fn the_library_that_is_linked_is_the_one_that_is_declared() {
    // Safety: no arguments.
    let v = unsafe { tailnode_version_number() } as i64;
    assert_eq!(v, TAILNODE_VERSION_MAJOR * 10000 + TAILNODE_VERSION_MINOR * 100 + TAILNODE_VERSION_PATCH);
}
