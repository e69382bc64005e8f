// Command bench measures tailnode and upstream's tsnet side by side: the same minimal program, and
// the same measured process (package child), built for each. Every node is a process of its own;
// rounds alternate between the sides; what is printed is medians, and ours as a ratio to upstream's.
// Both sides use upstream's coordination test server, and relays of either kind, on one machine and, where it may make
// one, in a network namespace, so that only the node differs.
package main

import (
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
)

// side is one implementation, as one way to build it.
type side struct {
	name string
	dir  string // of its mains, below child/ and min/
	tags string
	lean bool // for size and idle memory alone

	min, child string // binaries
}

// leanFeatures are the only of upstream's optional features without which tsnet does not compile or come up.
const leanFeatures = "acme,ipnbus,netstack,serve"

func main() {
	log.SetOutput(io.Discard) // upstream's STUN server logs there
	var o options
	flag.BoolVar(&o.quick, "quick", false, "fewer and shorter rounds")
	flag.StringVar(&o.json, "json", "", "write every value to this file")
	flag.StringVar(&o.csv, "csv", "", "write every value to this file, one a line")
	flag.StringVar(&o.markdown, "markdown", "", "write the table to this file")
	flag.StringVar(&o.from, "from", "", "measure nothing and take what -json wrote to this file")
	flag.StringVar(&o.only, "only", "", "comma-separated measurements: size, start, restart, idle, direct, relayed, close (default all)")
	flag.StringVar(&o.without, "without", "", "a side to leave out: ours or upstream")
	flag.StringVar(&o.profiles, "profile", "", "instead of measuring write CPU profiles of a transfer on each path to this folder")
	flag.StringVar(&o.congestion, "congestion", "cubic,reno", "kernel TCP congestion control in the namespace, the first of these that it may have; empty: the host's")
	host := flag.Bool("host", false, "measure on the host's network and not in a namespace")
	flag.Parse()
	if !*host && o.from == "" {
		done, err := isolate(o.congestion)
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		if done {
			return
		}
	}
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	quick                                                          bool
	json, csv, markdown, from, only, without, profiles, congestion string
}

func run(o options) error {
	if o.from != "" {
		rep, err := readReport(o.from)
		if err != nil {
			return err
		}
		return rep.write(o, []*side{{name: "ours"}, {name: "upstream"}, {name: "upstream, leanest"}})
	}
	p := full
	if o.quick {
		p = quick
	}
	p.profiles = o.profiles
	wants := func(what string) bool { return o.only == "" || slices.Contains(strings.Split(o.only, ","), what) }

	tmp, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	sides := []*side{{name: "ours", dir: "ours"}, {name: "upstream", dir: "upstream"}}
	if (wants("size") || wants("idle")) && p.profiles == "" {
		lean, err := command("go", "run", "tailscale.com/cmd/featuretags", "--min", "--add="+leanFeatures)
		if err != nil {
			return err
		}
		sides = append(sides, &side{name: "upstream, leanest", dir: "upstream", tags: lean, lean: true})
	}
	sides = slices.DeleteFunc(sides, func(s *side) bool { return s.dir == o.without })
	rep := &report{
		Go: runtime.Version(), System: runtime.GOOS + "/" + runtime.GOARCH, Kernel: sysctl("kernel.osrelease"),
		CPUs: runtime.NumCPU(), Upstream: upstreamVersion(), Namespace: namespaced(),
		Congestion: sysctl("net.ipv4.tcp_congestion_control"), UDPBuffer: sysctl("net.core.rmem_max"), Root: os.Geteuid() == 0,
		LoadAtStart: loadAverage(),
	}
	for i, s := range sides {
		progress("building %s", s.name)
		s.min, s.child = filepath.Join(tmp, fmt.Sprint("min", i)), filepath.Join(tmp, fmt.Sprint("child", i))
		if err := build(s, rep, wants("size")); err != nil {
			return err
		}
	}
	rep.open = nil // sizes do not depend on what else runs
	if p.profiles != "" {
		if err := os.MkdirAll(p.profiles, 0o755); err != nil {
			return err
		}
		for _, s := range sides {
			progress("profiles of %s", s.name)
			if err := profiled(s, &p); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
		return nil
	}
	for _, m := range measurements {
		if !wants(m.name) {
			continue
		}
		for i := range m.rounds(&p) {
			for _, s := range sides {
				if s.lean && (!m.lean || i > 0) {
					continue
				}
				p.patience.wait(p.quiet)
				progress("%s, round %d of %d, %s", m.name, i+1, m.rounds(&p), s.name)
				a := newAccount()
				if err := m.run(s, rep, &p, i); err != nil {
					// What one side cannot do is told; what it did before and what comes after still counts.
					progress("%s: %s: %v", m.name, s.name, err)
					rep.Failures = append(rep.Failures, fmt.Sprintf("%s, round %d, %s: %v", m.name, i+1, s.name, err))
				}
				rep.settle(a.others())
			}
		}
	}
	rep.LoadAtEnd = loadAverage()
	return rep.write(o, sides)
}

// write prints the table, and writes the files that are asked for.
func (r *report) write(o options, sides []*side) error {
	r.print(os.Stdout, sides)
	if o.json != "" {
		if err := r.writeJSON(o.json); err != nil {
			return err
		}
	}
	if o.csv != "" {
		if err := r.writeCSV(o.csv); err != nil {
			return err
		}
	}
	if o.markdown != "" {
		return r.writeMarkdown(o.markdown, sides)
	}
	return nil
}

// build builds a side's programs and notes the weight of the minimal one.
func build(s *side, rep *report, size bool) error {
	for _, b := range []struct{ out, pkg string }{{s.min, "./min/" + s.dir}, {s.child, "./child/" + s.dir}} {
		if _, err := command("go", "build", "-trimpath", "-ldflags=-s -w", "-tags", s.tags, "-o", b.out, b.pkg); err != nil {
			return err
		}
	}
	if !size {
		return nil
	}
	fi, err := os.Stat(s.min)
	if err != nil {
		return err
	}
	rep.add("size of a minimal program, stripped", "MB", true, s, float64(fi.Size())/1e6)
	deps, err := command("go", "list", "-deps", "-tags", s.tags, "-f", "{{.ImportPath}} {{.Standard}}", "./min/"+s.dir)
	if err != nil {
		return err
	}
	rep.add("packages linked", "", true, s, float64(strings.Count(deps, "\n"))) // without the program's own
	rep.add("packages linked outside of the standard library", "", true, s, float64(strings.Count(deps, " false")-1))
	return nil
}

func command(name string, args ...string) (string, error) {
	var errs strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, errs.String())
	}
	return strings.TrimSpace(string(out)), nil
}

func upstreamVersion() string {
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, d := range bi.Deps {
			if d.Path == "tailscale.com" {
				return d.Version
			}
		}
	}
	return "unknown"
}

// progress tells each step, apart from the result.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}
