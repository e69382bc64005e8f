package main

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"text/tabwriter"
)

// metric is one row: what was measured of each side, in rounds.
type metric struct {
	Name   string
	Unit   string
	Less   bool                 // less is better
	Values map[string][]float64 // by side
	Others map[string][]float64 // by side: how many processors were busy with other things during the measurement
}

type report struct {
	Go, System, Kernel string
	CPUs               int
	Upstream           string
	Namespace          bool   // all of it ran in a network namespace of its own
	Congestion         string // the kernel's TCP congestion control, which carries what goes by relay
	UDPBuffer          string // the most that a socket gets without privilege, in bytes
	Root               bool   // with privilege sockets get more
	LoadAtStart        float64
	LoadAtEnd          float64
	Failures           []string // measurements that a side did not get through
	Metrics            []*metric

	open []struct { // values of the measurement under way
		m    *metric
		side string
	}
}

func (r *report) add(name, unit string, less bool, s *side, v float64) {
	i := slices.IndexFunc(r.Metrics, func(m *metric) bool { return m.Name == name })
	if i < 0 {
		i = len(r.Metrics)
		r.Metrics = append(r.Metrics, &metric{Name: name, Unit: unit, Less: less, Values: map[string][]float64{}, Others: map[string][]float64{}})
	}
	m := r.Metrics[i]
	m.Values[s.name] = append(m.Values[s.name], v)
	r.open = append(r.open, struct {
		m    *metric
		side string
	}{m, s.name})
}

// settle notes what others took from the machine while the values since the last call were measured.
func (r *report) settle(others float64) {
	for _, o := range r.open {
		o.m.Others[o.side] = append(o.m.Others[o.side], others)
	}
	r.open = nil
}

func (r *report) writeJSON(name string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(name, append(b, '\n'), 0o644)
}

// writeCSV writes one line for each value.
func (r *report) writeCSV(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	w := csv.NewWriter(f)
	w.Write([]string{"measure", "unit", "better", "side", "round", "value", "processors busy with other things"})
	for _, m := range r.Metrics {
		for _, side := range sortedKeys(m.Values) {
			for i, v := range m.Values[side] {
				var others string
				if i < len(m.Others[side]) {
					others = number(m.Others[side][i])
				}
				w.Write([]string{m.Name, m.Unit, m.better(), side, strconv.Itoa(i + 1), strconv.FormatFloat(v, 'g', 6, 64), others})
			}
		}
	}
	w.Flush()
	if err := w.Error(); err != nil {
		return err
	}
	return f.Close()
}

func (m *metric) better() string {
	if m.Less {
		return "less"
	}
	return "more"
}

func (r *report) print(out io.Writer, sides []*side) {
	fmt.Fprintf(out, "%s, %s, Linux %s, %d processors, upstream %s\n\n", r.Go, r.System, r.Kernel, r.CPUs, r.Upstream)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "median (least - most)\t")
	for _, s := range sides {
		fmt.Fprint(w, s.name, "\t")
	}
	fmt.Fprintln(w, "ours / upstream\tbetter is\t")
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
			fmt.Fprintf(w, "%.2f", median(ours)/median(theirs))
		}
		fmt.Fprintf(w, "\t%s\t\n", m.better())
	}
	w.Flush()
	r.printConditions(out, sides)
}

// writeMarkdown writes the table of medians as docs/performance.md has it.
func (r *report) writeMarkdown(name string, sides []*side) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	fmt.Fprintf(f, "| median (least - most) | ours | upstream | ours / upstream | better is |\n|---|---|---|---|---|\n")
	for _, m := range r.Metrics {
		what, ratio := m.Name, ""
		if m.Unit != "" {
			what += ", " + m.Unit
		}
		ours, theirs := m.Values["ours"], m.Values["upstream"]
		if len(ours) > 0 && len(theirs) > 0 && median(theirs) != 0 {
			ratio = fmt.Sprintf("%.3g", median(ours)/median(theirs))
		}
		fmt.Fprintf(f, "| %s | %s | %s | %s | %s |\n", what, spread(ours), spread(theirs), ratio, m.better())
	}
	fmt.Fprintln(f)
	r.printConditions(f, sides)
	return f.Close()
}

// readReport reads what writeJSON wrote.
func readReport(name string) (*report, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	r := new(report)
	return r, json.Unmarshal(b, r)
}

// printConditions says what the numbers were measured under.
func (r *report) printConditions(out io.Writer, sides []*side) {
	where := "on the host's own network"
	if r.Namespace {
		where = "in a network namespace of their own"
	}
	fmt.Fprintf(out, "\nBoth sides alternated %s; kernel TCP (to relays) with %s; net.core.rmem_max %s", where, r.Congestion, r.UDPBuffer)
	if r.Root {
		fmt.Fprint(out, ", which root's sockets may exceed")
	}
	fmt.Fprintf(out, ".\nLoad average %.1f at the start, %.1f at the end. Processors busy with other things while measuring, median (least - most):", r.LoadAtStart, r.LoadAtEnd)
	for _, s := range sides {
		var all []float64
		for _, m := range r.Metrics {
			all = append(all, m.Others[s.name]...)
		}
		if len(all) > 0 {
			fmt.Fprintf(out, " %s %s;", s.name, spread(all))
		}
	}
	for _, f := range r.Failures {
		defer fmt.Fprintln(out, "Failed:", f)
	}
	fmt.Fprintln(out, "\nwhich cannot be told from the kernel's work on our packets outside of our processes. Both processes share the processors with the relay and control.")
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if len(s)%2 == 1 {
		return s[len(s)/2]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}

// number writes three digits of a number, and all digits before the point.
func number(v float64) string {
	if v >= 100 || v <= -100 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}

func spread(v []float64) string {
	switch {
	case len(v) == 0:
		return ""
	case slices.Min(v) == slices.Max(v):
		return number(v[0])
	}
	return fmt.Sprintf("%s (%s - %s)", number(median(v)), number(slices.Min(v)), number(slices.Max(v)))
}

func sortedKeys(m map[string][]float64) []string {
	var ks []string
	for k := range m {
		ks = append(ks, k)
	}
	slices.Sort(ks)
	return ks
}
