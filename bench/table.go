package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// line is a row of the table as text.
type line struct {
	name, ours, upstream, leanest, ratio, goal string
}

// lines are the rows, and behind the rows of each measure what failed of it.
func (rep *report) lines() []line {
	var out []line
	for _, me := range measures {
		failed := func(side string) bool {
			return slices.ContainsFunc(rep.Failures, func(f failure) bool {
				return f.Measure == me.name && (f.Side == side || f.Side == "" && me.who != alone)
			})
		}
		for _, m := range rep.Metrics {
			if m.Measure != me.name {
				continue
			}
			cell := func(side string) string {
				if len(m.Values[side]) == 0 && failed(side) {
					return "failed"
				}
				return spread(m.Values[side])
			}
			l := line{name: m.Name, ours: cell(ours), upstream: cell(upstream), leanest: spread(m.Values[leanest]), goal: m.goal()}
			if m.Unit != "" {
				l.name += ", " + m.Unit
			}
			if r, ok := m.ratio(); ok {
				l.ratio = fmt.Sprintf("%.3g", r)
			}
			out = append(out, l)
		}
		// The same reason again and again is one line.
		type key struct{ side, reason string }
		var order []key
		rounds := map[key][]string{}
		for _, f := range rep.Failures {
			if f.Measure == me.name {
				k := key{f.Side, f.Reason}
				if rounds[k] == nil {
					order = append(order, k)
				}
				rounds[k] = append(rounds[k], strconv.Itoa(f.Round))
			}
		}
		for _, k := range order {
			l := line{name: fmt.Sprintf("%s: round %s failed", me.name, strings.Join(rounds[k], ", "))}
			switch k.side {
			case ours:
				l.ours = k.reason
			case upstream:
				l.upstream = k.reason
			case leanest:
				l.leanest = k.reason
			default:
				l.name += ": " + k.reason
			}
			out = append(out, l)
		}
	}
	return out
}

func (rep *report) print(out io.Writer) {
	fmt.Fprintf(out, "%s, %s, Linux %s, %d processors (%s), upstream %s\n\n", rep.Go, rep.System, rep.Kernel, rep.CPUs, rep.Processor, rep.Upstream)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "median (least - most)\tours\tupstream\tours / upstream\tgoal\tupstream, leanest\t")
	for _, l := range rep.lines() {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t\n", l.name, l.ours, l.upstream, l.ratio, l.goal, l.leanest)
	}
	w.Flush()
	rep.printConditions(out)
	if len(rep.Busy) > 0 {
		fmt.Fprint(out, "Processor time of others while measuring, of those that were there at the end of a round:")
		names := sortedKeys(rep.Busy)
		slices.SortFunc(names, func(a, b string) int { return int(math.Copysign(1, rep.Busy[b]-rep.Busy[a])) })
		for _, n := range names[:min(len(names), 8)] {
			fmt.Fprintf(out, " %s %.1f s;", n, rep.Busy[n])
		}
		fmt.Fprintln(out)
	}
}

// markdown is the table of medians as docs/performance.md has it.
func (rep *report) markdown() string {
	var s strings.Builder
	s.WriteString("| median (least - most) | ours | upstream | ours / upstream | goal |\n|---|---|---|---|---|\n")
	for _, l := range rep.lines() {
		fmt.Fprintf(&s, "| %s | %s | %s | %s | %s |\n", cellText(l.name), cellText(l.ours), cellText(l.upstream), l.ratio, l.goal)
	}
	var lean []string
	for _, l := range rep.lines() {
		if l.leanest != "" {
			lean = append(lean, l.name+" "+l.leanest)
		}
	}
	if lean != nil {
		fmt.Fprintf(&s, "\nUpstream at its leanest: %s.\n", strings.Join(lean, "; "))
	}
	rep.printConditions(&s)
	return s.String()
}

func (rep *report) writeMarkdown(name string) error {
	return os.WriteFile(name, []byte(rep.markdown()), 0o644)
}

// The table in performance.md stands between these lines.
const (
	tableBegin = "<!-- what follows is written by bench -docs -->\n"
	tableEnd   = "<!-- end of what bench writes -->\n"
)

// writeDocs replaces the table in performance.md and writes the chart beside it.
func (rep *report) writeDocs(dir string) error {
	name := filepath.Join(dir, "performance.md")
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	head, rest, ok := strings.Cut(string(b), tableBegin)
	_, foot, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no place for the table: it goes between the lines %q and %q", name, tableBegin, tableEnd)
	}
	if err := os.WriteFile(name, []byte(head+tableBegin+"\n"+rep.markdown()+"\n"+tableEnd+foot), 0o644); err != nil {
		return err
	}
	return rep.writeSVG(filepath.Join(dir, "performance.svg"))
}

func cellText(s string) string { return strings.ReplaceAll(s, "|", "\\|") }

// printConditions says what the numbers were measured under.
func (rep *report) printConditions(out io.Writer) {
	where := "on the host's own network"
	if rep.Namespace {
		where = "in a network namespace of their own"
	}
	how := "in full"
	if rep.Quick {
		how = "with -quick"
	}
	fmt.Fprintf(out, "\nMeasured %s in %s with %s on %s, Linux %s, %d processors (%s), beside upstream %s. ",
		how, rep.Took, rep.Go, rep.System, rep.Kernel, rep.CPUs, rep.Processor, rep.Upstream)
	if len(rep.Again) > 0 {
		fmt.Fprintf(out, "Measured in a run of their own: %s. ", strings.Join(rep.Again, ", "))
	}
	fmt.Fprintf(out, "Both sides alternated %s; kernel TCP (to relays) with %s; net.core.rmem_max %s", where, rep.Congestion, rep.UDPBuffer)
	if rep.Root {
		fmt.Fprint(out, ", which root's sockets may exceed")
	}
	fmt.Fprintf(out, ".\nLoad average %.1f at the start, %.1f at the end. Processors busy with other things while measuring, median (least - most):", rep.LoadAtStart, rep.LoadAtEnd)
	for _, s := range []string{ours, upstream} {
		var all []float64
		for _, m := range rep.Metrics {
			all = append(all, m.Others[s]...)
		}
		if len(all) > 0 {
			fmt.Fprintf(out, " %s %s;", s, spread(all))
		}
	}
	fmt.Fprintln(out, "\nwhich cannot be told from the kernel's work on our packets outside of our processes. Not controlled: the nodes share the processors with the\n"+
		"relay, the coordination server and whatever else runs; clock frequency and other guests of the same hardware; the kernel's choice of processor.")
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
	case number(slices.Min(v)) == number(slices.Max(v)):
		return number(v[0])
	}
	return fmt.Sprintf("%s (%s - %s)", number(median(v)), number(slices.Min(v)), number(slices.Max(v)))
}
