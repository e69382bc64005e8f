// Command bench measures tailnode and upstream's tsnet side by side: the same minimal program, and
// the same measured process (package child), built for each. Every node is a process of its own;
// rounds alternate between the sides; what is printed is medians, and ours as a ratio to upstream's.
// Both sides use upstream's coordination test server and relay, on loopback, so that only the node
// differs.
package main

import (
	"encoding/json"
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
	"text/tabwriter"
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

// leanFeatures are the only of upstream's optional features without which tsnet does not compile or come up.
const leanFeatures = "acme,ipnbus,netstack,serve"

// metric is one row: what was measured of each side, in rounds.
type metric struct {
	Name   string
	Unit   string
	Less   bool                 // less is better
	Values map[string][]float64 // by side
}

type report struct {
	When     time.Time
	Go       string
	System   string
	CPUs     int
	Upstream string
	Metrics  []*metric
}

func (r *report) add(name, unit string, less bool, side string, v float64) {
	i := slices.IndexFunc(r.Metrics, func(m *metric) bool { return m.Name == name })
	if i < 0 {
		i = len(r.Metrics)
		r.Metrics = append(r.Metrics, &metric{Name: name, Unit: unit, Less: less, Values: map[string][]float64{}})
	}
	r.Metrics[i].Values[side] = append(r.Metrics[i].Values[side], v)
}

func main() {
	log.SetOutput(io.Discard) // upstream's STUN server logs there
	quick := flag.Bool("quick", false, "fewer and shorter rounds")
	jsonFile := flag.String("json", "", "write every value to this file")
	only := flag.String("only", "", "comma-separated measurements: size, up, idle, speed (default all)")
	without := flag.String("without", "", "a side to leave out: ours or upstream")
	flag.Parse()
	if err := run(*quick, *jsonFile, *only, *without); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// plan is how much is measured.
type plan struct {
	rounds int
	ups    int
	idle   time.Duration
	stream time.Duration
}

func run(quick bool, jsonFile, only, without string) error {
	p := plan{rounds: 5, ups: 15, idle: 10 * time.Second, stream: 8 * time.Second}
	if quick {
		p = plan{rounds: 2, ups: 5, idle: 10 * time.Second, stream: 3 * time.Second}
	}
	wants := func(what string) bool { return only == "" || slices.Contains(strings.Split(only, ","), what) }

	tmp, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	lean, err := command("go", "run", "tailscale.com/cmd/featuretags", "--min", "--add="+leanFeatures)
	if err != nil {
		return err
	}
	sides := []*side{
		{name: "ours", dir: "ours"},
		{name: "upstream", dir: "upstream"},
		{name: "upstream, leanest", dir: "upstream", tags: lean, lean: true},
	}
	sides = slices.DeleteFunc(sides, func(s *side) bool { return s.dir == without })
	rep := &report{When: time.Now().UTC(), Go: runtime.Version(), System: runtime.GOOS + "/" + runtime.GOARCH, CPUs: runtime.NumCPU(), Upstream: upstreamVersion()}
	for i, s := range sides {
		progress("building %s", s.name)
		s.min, s.child = filepath.Join(tmp, fmt.Sprint("min", i)), filepath.Join(tmp, fmt.Sprint("child", i))
		if err := build(s, rep); err != nil {
			return err
		}
	}
	if wants("up") {
		for i := range p.ups {
			for _, s := range sides {
				if s.lean {
					continue
				}
				progress("start to Up, round %d of %d, %s", i+1, p.ups, s.name)
				if err := measureUp(s, rep); err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
			}
		}
	}
	for i := range p.rounds {
		for _, s := range sides {
			if wants("idle") && (!s.lean || i == 0) {
				progress("idle memory, round %d of %d, %s", i+1, p.rounds, s.name)
				if err := measureIdle(s, rep, p.idle); err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
			}
			if wants("speed") && !s.lean {
				progress("throughput, round %d of %d, %s", i+1, p.rounds, s.name)
				if err := measureSpeed(s, rep, p.stream); err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
			}
		}
	}
	if jsonFile != "" {
		b, err := json.MarshalIndent(rep, "", "\t")
		if err != nil {
			return err
		}
		if err := os.WriteFile(jsonFile, append(b, '\n'), 0o644); err != nil {
			return err
		}
	}
	rep.print(sides)
	return nil
}

// build builds a side's programs and notes the weight of the minimal one.
func build(s *side, rep *report) error {
	for _, b := range []struct{ out, pkg string }{{s.min, "./min/" + s.dir}, {s.child, "./child/" + s.dir}} {
		if _, err := command("go", "build", "-trimpath", "-ldflags=-s -w", "-tags", s.tags, "-o", b.out, b.pkg); err != nil {
			return err
		}
	}
	fi, err := os.Stat(s.min)
	if err != nil {
		return err
	}
	rep.add("size of a minimal program, stripped", "MB", true, s.name, float64(fi.Size())/1e6)
	deps, err := command("go", "list", "-deps", "-tags", s.tags, "-f", "{{.ImportPath}} {{.Standard}}", "./min/"+s.dir)
	if err != nil {
		return err
	}
	rep.add("packages linked", "", true, s.name, float64(strings.Count(deps, "\n"))) // without the program's own
	rep.add("packages linked outside of the standard library", "", true, s.name, float64(strings.Count(deps, " false")-1))
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

func (r *report) print(sides []*side) {
	fmt.Printf("%s, %s, %d CPUs, upstream %s, %s\n\n", r.Go, r.System, r.CPUs, r.Upstream, r.When.Format(time.DateOnly))
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "median (least - most)\t")
	for _, s := range sides {
		fmt.Fprint(w, s.name, "\t")
	}
	fmt.Fprintln(w, "ours / upstream\t")
	for _, m := range r.Metrics {
		name := m.Name
		if m.Unit != "" {
			name += ", " + m.Unit
		}
		fmt.Fprint(w, name, "\t")
		for _, s := range sides {
			fmt.Fprint(w, spread(m.Values[s.name]), "\t")
		}
		ours, theirs := m.Values["ours"], m.Values["upstream"]
		if len(ours) > 0 && len(theirs) > 0 && median(theirs) != 0 {
			better := "more is better"
			if m.Less {
				better = "less is better"
			}
			fmt.Fprintf(w, "%.2f (%s)\t", median(ours)/median(theirs), better)
		}
		fmt.Fprintln(w)
	}
	w.Flush()
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if len(s)%2 == 1 {
		return s[len(s)/2]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}

func spread(v []float64) string {
	switch {
	case len(v) == 0:
		return ""
	case slices.Min(v) == slices.Max(v):
		return fmt.Sprintf("%.4g", v[0])
	}
	return fmt.Sprintf("%.3g (%.3g - %.3g)", median(v), slices.Min(v), slices.Max(v))
}
