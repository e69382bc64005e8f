// Command bench measures tailnode and upstream's tsnet side by side: the same minimal program, and
// the same measured process (package child), built for each. Every node is a process of its own;
// rounds alternate between the sides; what is printed is medians, and ours as a ratio to upstream's.
// Both sides use the same coordination server and relays, on one machine and, where it may make
// one, in a network namespace, so that only the node differs.
//
// What is measured is the list in measures.go.
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
	"time"
)

// side is one implementation, as one way to build it.
type side struct {
	name string
	dir  string // of its mains, below child/ and min/
	tags string
	lean bool // for size and idle memory alone

	min, child string // binaries
}

const (
	ours     = "ours"
	upstream = "upstream"
	leanest  = "upstream, leanest"
)

// leanFeatures are the only of upstream's optional features without which tsnet does not compile or come up.
const leanFeatures = "acme,ipnbus,netstack,serve"

type options struct {
	quick                                                                     bool
	json, csv, markdown, svg, docs, from, only, without, profiles, congestion string
	rounds                                                                    int
}

func main() {
	log.SetOutput(io.Discard) // upstream's servers log there
	var o options
	flag.BoolVar(&o.quick, "quick", false, "fewer and shorter rounds")
	flag.StringVar(&o.json, "json", "", "write every value to this file, after each measure")
	flag.StringVar(&o.csv, "csv", "", "write every value to this file, one a line")
	flag.StringVar(&o.markdown, "markdown", "", "write the table to this file")
	flag.StringVar(&o.svg, "svg", "", "write a chart of the ratios to this file")
	flag.StringVar(&o.docs, "docs", "", "put the table into performance.md of this folder, between its marks, and the chart beside it as performance.svg")
	flag.StringVar(&o.from, "from", "", "measure nothing and take what -json wrote to these files, comma-separated: a later one's measures replace an earlier one's")
	flag.StringVar(&o.only, "only", "", "comma-separated measures (default all; see -list)")
	flag.StringVar(&o.without, "without", "", "a side to leave out: ours or upstream")
	flag.IntVar(&o.rounds, "rounds", 0, "rounds of each measure, instead of its own number")
	flag.StringVar(&o.profiles, "profile", "", "instead of measuring write CPU profiles of a transfer on each path to this folder")
	flag.StringVar(&o.congestion, "congestion", "cubic,reno", "kernel TCP congestion control in the namespace, the first of these that it may have; empty: the host's")
	host := flag.Bool("host", false, "measure on the host's network and not in a namespace")
	list := flag.Bool("list", false, "say what is measured")
	flag.Parse()
	if *list {
		for _, m := range measures {
			fmt.Printf("%-12s %s\n", m.name, m.what)
		}
		return
	}
	err := o.check()
	if err == nil && !*host && o.from == "" {
		var done bool
		if done, err = isolate(o.congestion); done && err == nil {
			return
		}
	}
	if err == nil {
		err = run(o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// check refuses names that do not exist before anything takes its time.
func (o *options) check() error {
	if o.only == "" {
		return nil
	}
	for _, name := range strings.Split(o.only, ",") {
		if !slices.ContainsFunc(measures, func(m *measure) bool { return m.name == name }) {
			return fmt.Errorf("no measure %q; see -list", name)
		}
	}
	return nil
}

func (o *options) wants(name string) bool {
	return o.only == "" || slices.Contains(strings.Split(o.only, ","), name)
}

func run(o options) error {
	if o.from != "" {
		rep, err := readReports(strings.Split(o.from, ","))
		if err != nil {
			return err
		}
		return rep.write(o)
	}
	p := plans[0]
	if o.quick {
		p = plans[1]
	}
	tmp, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	os.Setenv("TMPDIR", tmp) // of the nodes that are killed, too
	sides := []*side{{name: ours, dir: "ours"}, {name: upstream, dir: "upstream"}}
	if (o.wants("size") || o.wants("idle")) && o.profiles == "" {
		tags, err := command("go", "run", "tailscale.com/cmd/featuretags", "--min", "--add="+leanFeatures)
		if err != nil {
			return err
		}
		sides = append(sides, &side{name: leanest, dir: "upstream", tags: tags, lean: true})
	}
	sides = slices.DeleteFunc(sides, func(s *side) bool { return s.dir == o.without })
	for i, s := range sides {
		progress("building %s", s.name)
		s.min, s.child = filepath.Join(tmp, fmt.Sprint("min", i)), filepath.Join(tmp, fmt.Sprint("child", i))
		if err := goBuild(s.min, "./min/"+s.dir, s.tags, "-s -w"); err != nil {
			return err
		}
		if err := goBuild(s.child, "./child/"+s.dir, s.tags, "-s -w"); err != nil {
			return err
		}
	}
	if o.profiles != "" {
		return profile(o.profiles, sides, &p)
	}
	began := time.Now()
	rep := &report{
		Go: runtime.Version(), System: runtime.GOOS + "/" + runtime.GOARCH, Kernel: sysctl("kernel.osrelease"), Processor: processor(),
		CPUs: runtime.NumCPU(), Upstream: upstreamVersion(), Quick: o.quick, Namespace: namespaced(),
		Congestion: sysctl("net.ipv4.tcp_congestion_control"), UDPBuffer: sysctl("net.core.rmem_max"), Root: os.Geteuid() == 0,
		LoadAtStart: loadAverage(), Busy: map[string]float64{},
	}
	for _, m := range measures {
		if !o.wants(m.name) {
			continue
		}
		rep.measureAll(m, &p, sides, o.rounds)
		rep.LoadAtEnd, rep.Took = loadAverage(), time.Since(began).Round(time.Second).String()
		if o.json != "" { // what follows may still go wrong
			if err := rep.writeJSON(o.json); err != nil {
				return err
			}
		}
	}
	return rep.write(o)
}

// measureAll runs all rounds of a measure. What a side cannot do is noted; what it did before and what comes after still counts.
func (rep *report) measureAll(m *measure, p *plan, sides []*side, rounds int) {
	if rounds == 0 {
		rounds = m.count[p.index()]
	}
	began := time.Now()
	for n := range rounds {
		if m.who != eachSide {
			rep.measureOnce(&round{m: m, p: p, n: n, sides: sides}, rounds)
			continue
		}
		for _, s := range sides {
			if !s.lean {
				rep.measureOnce(&round{m: m, p: p, n: n, side: s, sides: sides}, rounds)
			}
		}
	}
	progress("%s took %v", m.name, time.Since(began).Round(100*time.Millisecond))
}

func (rep *report) measureOnce(r *round, rounds int) {
	who := "all sides"
	if r.side != nil {
		who = r.side.name
	}
	if r.m.name != "size" { // sizes do not depend on what else runs
		r.p.patience.wait(r.p.quiet)
	}
	progress("%s, round %d of %d, %s", r.m.name, r.n+1, rounds, who)
	a := newAccount()
	if err := r.do(); err != nil {
		progress("%s: %s: %v", r.m.name, who, err)
		side := ""
		if r.side != nil {
			side = r.side.name
		}
		r.fail(side, err)
	}
	others, busy := a.others()
	for name, s := range busy {
		rep.Busy[name] += s
	}
	rep.take(r, others)
}

// write prints the table, and writes the files that are asked for.
func (rep *report) write(o options) error {
	rep.print(os.Stdout)
	for _, f := range []struct {
		name  string
		write func(string) error
	}{{o.json, rep.writeJSON}, {o.csv, rep.writeCSV}, {o.markdown, rep.writeMarkdown}, {o.svg, rep.writeSVG}} {
		if f.name == "" {
			continue
		}
		if err := f.write(f.name); err != nil {
			return err
		}
	}
	if o.docs != "" {
		return rep.writeDocs(o.docs)
	}
	return nil
}

func goBuild(out, pkg, tags, ldflags string) error {
	_, err := command("go", "build", "-trimpath", "-ldflags="+ldflags, "-tags", tags, "-o", out, pkg)
	return err
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
