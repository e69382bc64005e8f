package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// faces are the programs that do the same by each way into the node, as far as they are built: cabi/gobench, cabi/test/bench.c and
// rust/tailnode/examples/bench.rs. Each runs on a tailnet of cabi/testnet, whose Go node is the other end, and prints lines of
// three columns: who, what with its unit, and the value.
var faces = []struct {
	name string
	path []string // where it may be, from the root
	env  string
	make string // what builds it
}{
	{"Go in process", []string{"cabi/build/gobench"}, "", "make -C cabi bench"},
	{"C library, in process", []string{"cabi/build/test/bench"}, "TAILNODE_TEST_MODE=inprocess", "make -C cabi bench"},
	{"C library, isolated", []string{"cabi/build/test/bench"}, "TAILNODE_TEST_MODE=isolated", "make -C cabi bench"},
	{"Rust crate, in process", []string{"rust/target/release/examples/bench"}, "TAILNODE_TEST_MODE=inprocess", rustBench},
	{"Rust crate, isolated", []string{"rust/target/release/examples/bench"}, "TAILNODE_TEST_MODE=isolated", rustBench},
}

const rustBench = "cd rust && cargo build --release -p tailnode --example bench"

// faceRows are those of the values that become rows here.
var faceRows = []struct {
	what, name, unit string
	more             bool
}{
	{"send, Gbit/s", "send", "Gbit/s", true},
	{"receive, Gbit/s", "receive", "Gbit/s", true},
	{"round trip of 1 byte, p50, us", "round trip, p50", "µs", false},
	{"dialled, accepted and closed, 1/s", "connections", "1/s", true},
}

// measureFaces compares the C library and the Rust crate with Go in process. Upstream has nothing to be compared with here.
func measureFaces(r *round) error {
	ctx, cancel := context.WithTimeout(context.Background(), r.m.limit[r.p.index()])
	defer cancel()
	testnet, err := filepath.Abs("../cabi/build/testnet")
	if err != nil {
		return err
	}
	if _, err := os.Stat(testnet); err != nil {
		return errors.New("not built: make -C cabi bench builds it")
	}
	size := "256" // MB each way
	if r.p.quick {
		size = "64"
	}
	var base map[string]float64
	for _, f := range faces {
		got, err := face(ctx, testnet, f.path, f.env, size)
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("not built: %s", f.make)
		}
		if err != nil {
			r.fail(ours, fmt.Errorf("%s: %w", f.name, err))
			continue
		}
		for _, w := range faceRows {
			v, ok := got[w.what]
			switch {
			case !ok:
				r.fail(ours, fmt.Errorf("%s: says nothing of %q", f.name, w.what))
			case base == nil:
				r.addAs(ours, row{name: f.name + ": " + w.name, unit: w.unit, more: w.more}, v)
			case base[w.what] > 0:
				r.addAs(ours, row{name: f.name + ": " + w.name + ", by Go's", more: w.more}, v/base[w.what])
			}
		}
		if base == nil {
			base = got
		}
	}
	return nil
}

// face runs a program and returns its values by what they are of.
func face(ctx context.Context, testnet string, paths []string, env, size string) (map[string]float64, error) {
	prog, err := filepath.Abs(filepath.Join(append([]string{".."}, paths...)...))
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(prog); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, testnet, prog, size)
	build := filepath.Dir(testnet)
	cmd.Env = append(os.Environ(), "TAILNODE_TEST_BUILD="+build, "LD_LIBRARY_PATH="+build, "TAILNODE_HELPER="+filepath.Join(build, "tailnode-helper"))
	if env != "" {
		cmd.Env = append(cmd.Env, env)
	}
	var errs tail
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, errs.String())
	}
	got := map[string]float64{}
	for line := range strings.Lines(string(out)) {
		if f := strings.Split(strings.TrimSpace(line), "\t"); len(f) == 3 {
			if v, err := strconv.ParseFloat(f[2], 64); err == nil {
				got[f[1]] = v
			}
		}
	}
	return got, nil
}
