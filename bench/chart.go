package main

import (
	"fmt"
	"html"
	"math"
	"os"
	"strings"
)

// bar is one row of the chart: by how much ours is better, 2 for twice as good; goal is 0 if there is none.
type bar struct {
	name         string
	factor, goal float64
}

func (rep *report) bars() []bar {
	var out []bar
	for _, m := range rep.Metrics {
		r, ok := m.ratio()
		if !m.Chart || !ok || r <= 0 {
			continue
		}
		goal := m.Goal
		if !m.More {
			r = 1 / r
			if goal != 0 {
				goal = 1 / goal
			}
		}
		out = append(out, bar{m.Name, r, goal})
	}
	return out
}

// writeSVG draws how many times better ours is than upstream's, on a logarithmic axis, with a mark where the goal is.
func (rep *report) writeSVG(name string) error {
	const (
		left, width, high = 450, 450, 22 // of the bars, in pixels
		top, foot         = 56, 44
	)
	bars := rep.bars()
	lo, hi := 1.0, 1.0
	for _, b := range bars {
		lo, hi = min(lo, b.factor), max(hi, b.factor, b.goal)
	}
	lo, hi = min(0.5, lo/1.1), max(4, hi*1.1)
	x := func(f float64) float64 { return left + width*math.Log(f/lo)/math.Log(hi/lo) }
	height := top + high*len(bars) + foot
	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12" fill="#222">`+"\n",
		left+width+80, height, left+width+80, height)
	fmt.Fprintf(&s, `<rect width="100%%" height="100%%" fill="#fff"/>`+"\n")
	fmt.Fprintf(&s, `<text x="16" y="22" font-size="15" font-weight="bold">tailnode beside upstream's tsnet %s: how many times better</text>`+"\n", html.EscapeString(rep.Upstream))
	fmt.Fprintf(&s, `<text x="16" y="40" fill="#555">ratio of medians, logarithmic; right of 1 tailnode is ahead; a line across a bar is the goal</text>`+"\n")
	bottom := top + high*len(bars)
	for _, tick := range []float64{0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000} {
		if tick < lo || tick > hi {
			continue
		}
		colour, label := "#ddd", fmt.Sprintf("%g×", tick)
		if tick == 1 {
			colour = "#444"
		}
		fmt.Fprintf(&s, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="%s"/>`+"\n", x(tick), top, x(tick), bottom, colour)
		fmt.Fprintf(&s, `<text x="%.1f" y="%d" text-anchor="middle" fill="#555">%s</text>`+"\n", x(tick), bottom+16, label)
	}
	for i, b := range bars {
		y := top + high*i
		from, to, colour := x(1), x(b.factor), "#2f7d4f"
		if b.factor < 1 {
			from, to, colour = to, from, "#b5482f"
		}
		fmt.Fprintf(&s, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", left-12, y+15, html.EscapeString(b.name))
		fmt.Fprintf(&s, `<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", from, y+4, max(1, to-from), high-8, colour)
		if b.goal != 0 {
			fmt.Fprintf(&s, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#1b3a8a" stroke-width="2"/>`+"\n", x(b.goal), y+1, x(b.goal), y+high-1)
		}
		at := max(x(1), to)
		if b.goal != 0 && x(b.goal) > at-4 && x(b.goal) < at+46 { // the number does not lie under the mark
			at = x(b.goal)
		}
		fmt.Fprintf(&s, `<text x="%.1f" y="%d">%s×</text>`+"\n", at+5, y+15, number(b.factor))
	}
	fmt.Fprintf(&s, `<text x="16" y="%d" fill="#555">%s, %s, %d processors; values and conditions in docs/performance.md</text>`+"\n</svg>\n",
		height-10, html.EscapeString(rep.Go), html.EscapeString(rep.System), rep.CPUs)
	return os.WriteFile(name, []byte(s.String()), 0o644)
}
