package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func testReport(t *testing.T) *report {
	t.Helper()
	rep := &report{Busy: map[string]float64{}}
	p := plans[1]
	p.patience = 0
	o, u, l := &side{name: ours}, &side{name: upstream}, &side{name: leanest, lean: true}
	m := &measure{"start", "", eachSide, [2]int{2, 2}, secs(60, 60), func(r *round) error {
		v := 1.0
		if r.side == u {
			v = 4
			if r.n == 1 {
				return errors.New("does not\ncome up | at all")
			}
		}
		r.add(less("up", "ms", 0.5), v+float64(r.n))
		r.add(more("speed", "", 2), 1/v)
		return nil
	}}
	rep.measureAll(m, &p, []*side{o, u, l}, 0)
	hang := &measure{"close", "", eachSide, [2]int{1, 1}, [2]time.Duration{time.Millisecond, time.Millisecond}, func(r *round) error {
		time.Sleep(time.Second) // of the bubble's time, of which it has a millisecond
		r.add(less("late", "", 0), 1)
		return nil
	}}
	synctest.Test(t, func(*testing.T) { rep.measureAll(hang, &p, []*side{o}, 0) })
	rep.measureAll(&measure{"delta", "", together, [2]int{1, 1}, secs(60, 60), func(*round) error { panic("oh") }}, &p, []*side{o}, 0)
	return rep
}

func TestReport(t *testing.T) {
	rep := testReport(t)
	text := rep.markdown()
	for _, want := range []string{
		"| up, ms | 1.5 (1 - 2) | 4 | 0.375 | ≤ 0.5: met |",
		"| speed | 1 | 0.25 | 4 | ≥ 2: met |",
		`| start: round 2 failed |  | does not come up \| at all |  |  |`,
		"| close: round 1 failed | not done in 1ms |  |  |  |",
		"| delta: round 1 failed: panic: oh |",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if strings.Contains(text, "late") {
		t.Error("a value after its time counts")
	}
}

func TestFiles(t *testing.T) {
	rep := testReport(t)
	dir := t.TempDir()
	first, again := filepath.Join(dir, "a.json"), filepath.Join(dir, "b.json")
	if err := rep.writeJSON(first); err != nil {
		t.Fatal(err)
	}
	rep.Metrics, rep.Failures = rep.Metrics[1:], nil
	rep.Metrics[0].Values[ours] = []float64{9}
	if err := rep.writeJSON(again); err != nil {
		t.Fatal(err)
	}
	both, err := readReports([]string{first, again})
	if err != nil {
		t.Fatal(err)
	}
	if len(both.Metrics) != 1 || both.Metrics[0].Values[ours][0] != 9 || len(both.Failures) != 2 || len(both.Again) != 1 {
		t.Errorf("%+v", both)
	}
	doc := filepath.Join(dir, "performance.md")
	if err := os.WriteFile(doc, []byte("before\n"+tableBegin+"OLD\n"+tableEnd+"after\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := both.writeDocs(dir); err != nil {
			t.Fatal(err)
		}
	}
	b, _ := os.ReadFile(doc)
	if s := string(b); !strings.HasPrefix(s, "before\n"+tableBegin) || !strings.HasSuffix(s, tableEnd+"after\n") || strings.Contains(s, "OLD") ||
		strings.Count(s, "| speed |") != 1 {
		t.Error(s)
	}
	svg, _ := os.ReadFile(filepath.Join(dir, "performance.svg"))
	if !strings.Contains(string(svg), ">speed<") || !strings.HasSuffix(string(svg), "</svg>\n") {
		t.Error(string(svg))
	}
}
