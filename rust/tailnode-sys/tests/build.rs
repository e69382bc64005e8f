//! How the library is found: cargo is run on this crate in every kind of environment.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

/// A place of the tests' own for what cargo builds: the one in use is locked.
fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("build")
}

/// cargo, on this crate, without any of the variables that the build script reads.
fn cargo(args: &[&str]) -> Command {
    let mut c = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    c.args(args).args(["--locked", "--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]);
    c.env("CARGO_TARGET_DIR", target());
    for v in ["TAILNODE_LIB_DIR", "TAILNODE_LINK", "TAILNODE_SRC", "DOCS_RS", "GO", "PKG_CONFIG_PATH", "RUSTFLAGS"] {
        c.env_remove(v);
    }
    c.env("TAILNODE_NO_PKG_CONFIG", "1");
    c
}

fn run(mut c: Command) -> (bool, String) {
    let Output { status, stdout, stderr } = c.output().unwrap();
    (status.success(), format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr)))
}

/// $PATH without the program of this name: a directory that has it is replaced by links to all else in it.
fn path_without(name: &str) -> OsString {
    let path = env::var_os("PATH").unwrap();
    let dirs = env::split_paths(&path).enumerate().map(|(i, dir)| {
        if !dir.join(name).exists() {
            return dir;
        }
        let shadow = target().join(format!("path-{i}"));
        let _ = fs::remove_dir_all(&shadow);
        fs::create_dir_all(&shadow).unwrap();
        for e in fs::read_dir(&dir).unwrap().map(|e| e.unwrap()).filter(|e| e.file_name() != *name) {
            std::os::unix::fs::symlink(e.path(), shadow.join(e.file_name())).unwrap();
        }
        shadow
    });
    env::join_paths(dirs).unwrap()
}

/// What `make -C cabi` built, if the environment says where.
fn built() -> Option<PathBuf> {
    env::var_os("TAILNODE_LIB_DIR").map(PathBuf::from).filter(|d| d.join("libtailnode.so").exists())
}

#[test]
fn documentation_needs_no_go() {
    let mut c = cargo(&["check"]);
    c.env("DOCS_RS", "1").env("GO", "/nonexistent/go").env("CC", "/nonexistent/cc");
    let (ok, text) = run(c);
    assert!(ok, "{text}");
}

#[test]
fn go_that_is_missing_is_named_with_ways_out() {
    // In a place of its own: cargo does not ask again for what another test has built, because $PATH is another.
    let place = target().join("without-go");
    let mut c = cargo(&["check"]);
    c.env("PATH", path_without("go")).env("CARGO_TARGET_DIR", &place);
    let (ok, text) = run(c);
    assert!(!ok, "{text}");
    for part in
        ["Go, which builds it, is not installed", "https://go.dev/dl/", "TAILNODE_LIB_DIR", "pkg-config", "default-features = false"]
    {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    // Nothing of it is needed without the core.
    let mut c = cargo(&["check", "--no-default-features"]);
    c.env("PATH", path_without("go")).env("CARGO_TARGET_DIR", &place);
    let (ok, text) = run(c);
    assert!(ok, "{text}");
}

#[test]
fn a_directory_without_the_library_is_named() {
    let dir = target().join("empty");
    fs::create_dir_all(&dir).unwrap();
    let mut c = cargo(&["check"]);
    c.env("TAILNODE_LIB_DIR", &dir);
    let (ok, text) = run(c);
    assert!(!ok && text.contains("holds neither libtailnode.a with libtailnode-core.a nor libtailnode.so"), "{text}");
    let mut c = cargo(&["check"]);
    c.env("TAILNODE_SRC", &dir);
    let (ok, text) = run(c);
    assert!(!ok && text.contains("its source is not in") && text.contains("TAILNODE_LIB_DIR"), "{text}");
}

/// Built from source, linked statically, run.
#[test]
fn from_source() {
    let (ok, text) = run(cargo(&["run", "--example", "smoke"]));
    assert!(ok && text.contains("libtailnode 0.") && text.contains(" works"), "{text}");
}

/// The shared library, by directory and by pkg-config; the core is loaded at run time.
#[test]
fn shared() {
    let Some(dir) = built() else {
        eprintln!("skipped: TAILNODE_LIB_DIR names no shared library");
        return;
    };
    let mut c = cargo(&["run", "--example", "smoke"]);
    c.env("TAILNODE_LIB_DIR", &dir).env("TAILNODE_LINK", "dynamic").env("LD_LIBRARY_PATH", &dir);
    let (ok, text) = run(c);
    assert!(ok && text.contains(" works"), "{text}");

    if Command::new("pkg-config").arg("--version").output().is_err() {
        eprintln!("skipped: there is no pkg-config");
        return;
    }
    let pc = target().join("pkgconfig");
    fs::create_dir_all(&pc).unwrap();
    let text = format!("Name: tailnode\nDescription: for a test\nVersion: 0.1.0\nLibs: -L{} -ltailnode\nCflags:\n", dir.display());
    fs::write(pc.join("tailnode.pc"), text).unwrap();
    let mut c = cargo(&["run", "--example", "smoke"]);
    c.env_remove("TAILNODE_NO_PKG_CONFIG").env("PKG_CONFIG_PATH", &pc).env("LD_LIBRARY_PATH", &dir).env("GO", "/nonexistent/go");
    let (ok, text) = run(c);
    assert!(ok && text.contains(" works"), "{text}");
}
