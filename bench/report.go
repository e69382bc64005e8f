package main

import (
	"encoding/csv"
	"encoding/json"
	"os"
	"slices"
	"strconv"
	"strings"
)

// metric is one row of the table: what was measured of each side, in rounds.
type metric struct {
	Measure string
	Name    string
	Unit    string
	More    bool                 // more is better
	Goal    float64              `json:",omitempty"` // ratio to upstream that is to be reached
	Bound   float64              `json:",omitempty"` // value of ours that is to be reached
	Chart   bool                 `json:",omitempty"`
	Values  map[string][]float64 // by side
	Others  map[string][]float64 // by side: how many processors were busy with other things meanwhile
}

// failure says why something is not in the table.
type failure struct {
	Measure string
	Side    string // "" for all of them
	Round   int
	Reason  string
}

type report struct {
	Go, System, Kernel, Processor string
	CPUs                          int
	Upstream                      string
	Quick                         bool
	Took                          string
	Namespace                     bool   // all of it ran in a network namespace of its own
	Congestion                    string // the kernel's TCP congestion control, which carries what goes by relay
	UDPBuffer                     string // the most that a socket gets without privilege, in bytes
	Root                          bool   // with privilege sockets get more
	LoadAtStart                   float64
	LoadAtEnd                     float64
	Busy                          map[string]float64 // processor time of others while measuring, in seconds, by the name of the process
	Again                         []string           `json:",omitempty"` // measures that come from a run of their own
	Metrics                       []*metric
	Failures                      []failure
}

// take takes over what a round has found, and how many processors were busy with other things meanwhile.
func (rep *report) take(r *round, others float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, v := range r.values {
		i := slices.IndexFunc(rep.Metrics, func(m *metric) bool { return m.Measure == r.m.name && m.Name == v.row.name })
		if i < 0 {
			i = len(rep.Metrics)
			rep.Metrics = append(rep.Metrics, &metric{
				Measure: r.m.name, Name: v.row.name, Unit: v.row.unit, More: v.row.more, Goal: v.row.goal, Bound: v.row.bound,
				Chart: v.row.chart || v.row.goal != 0, Values: map[string][]float64{}, Others: map[string][]float64{},
			})
		}
		m := rep.Metrics[i]
		m.Values[v.side] = append(m.Values[v.side], v.v)
		m.Others[v.side] = append(m.Others[v.side], others)
	}
	rep.Failures = append(rep.Failures, r.cells...)
	r.values, r.cells = nil, nil // what comes after its time does not count
}

// reason is an error in one line that fits into a table.
func reason(err error) string {
	s := strings.Join(strings.Fields(err.Error()), " ")
	if r := []rune(s); len(r) > 160 {
		s = string(r[:80]) + " … " + string(r[len(r)-78:])
	}
	return s
}

func (m *metric) better() string {
	if m.More {
		return "more"
	}
	return "less"
}

// ratio is ours to upstream's, if both have one.
func (m *metric) ratio() (float64, bool) {
	a, b := m.Values[ours], m.Values[upstream]
	if len(a) == 0 || len(b) == 0 || median(b) <= 0 {
		return 0, false
	}
	return median(a) / median(b), true
}

// goal says what is to be reached and whether it is.
func (m *metric) goal() string {
	met := func(is, want float64) string {
		if is == want || (is > want) == m.More {
			return "met"
		}
		return "missed"
	}
	sign := "≤ "
	if m.More {
		sign = "≥ "
	}
	switch {
	case m.Bound != 0 && len(m.Values[ours]) > 0:
		return sign + number(m.Bound) + " " + m.Unit + ": " + met(median(m.Values[ours]), m.Bound)
	case m.Bound != 0:
		return sign + number(m.Bound) + " " + m.Unit
	case m.Goal == 0:
		return ""
	}
	if r, ok := m.ratio(); ok {
		return sign + number(m.Goal) + ": " + met(r, m.Goal)
	}
	return sign + number(m.Goal)
}

func (rep *report) writeJSON(name string) error {
	b, err := json.MarshalIndent(rep, "", "\t")
	if err != nil {
		return err
	}
	// By renaming, so that an end in the middle leaves what there was before.
	if err := os.WriteFile(name+".new", append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// readReports reads what writeJSON wrote; what a later file has measured replaces what an earlier one has of that.
func readReports(names []string) (*report, error) {
	var all *report
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		rep := new(report)
		if err := json.Unmarshal(b, rep); err != nil {
			return nil, err
		}
		if all == nil {
			all = rep
			continue
		}
		again := map[string]bool{}
		for _, m := range rep.Metrics {
			again[m.Measure] = true
		}
		for _, f := range rep.Failures {
			again[f.Measure] = true
		}
		all.Metrics = append(slices.DeleteFunc(all.Metrics, func(m *metric) bool { return again[m.Measure] }), rep.Metrics...)
		all.Failures = append(slices.DeleteFunc(all.Failures, func(f failure) bool { return again[f.Measure] }), rep.Failures...)
		all.Again = append(all.Again, sortedKeys(again)...)
		for who, s := range rep.Busy {
			all.Busy[who] += s
		}
	}
	order := map[string]int{}
	for i, m := range measures {
		order[m.name] = i
	}
	slices.SortStableFunc(all.Metrics, func(a, b *metric) int { return order[a.Measure] - order[b.Measure] })
	return all, nil
}

// writeCSV writes one line for each value, and one for each failure.
func (rep *report) writeCSV(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	w := csv.NewWriter(f)
	w.Write([]string{"measure", "row", "unit", "better", "side", "round", "value", "processors busy with other things", "failure"})
	for _, m := range rep.Metrics {
		for _, side := range sortedKeys(m.Values) {
			for i, v := range m.Values[side] {
				w.Write([]string{m.Measure, m.Name, m.Unit, m.better(), side, strconv.Itoa(i + 1), strconv.FormatFloat(v, 'g', 6, 64),
					number(m.Others[side][i]), ""})
			}
		}
	}
	for _, x := range rep.Failures {
		w.Write([]string{x.Measure, "", "", "", x.Side, strconv.Itoa(x.Round), "", "", x.Reason})
	}
	w.Flush()
	if err := w.Error(); err != nil {
		return err
	}
	return f.Close()
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if len(s)%2 == 1 {
		return s[len(s)/2]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}

func sortedKeys[V any](m map[string]V) []string {
	var ks []string
	for k := range m {
		ks = append(ks, k)
	}
	slices.Sort(ks)
	return ks
}
