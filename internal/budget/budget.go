// Package budget holds what the node may cost where that can be measured the same way every time: the size of a program, what a packet
// allocates, what an idle peer weighs. Tests measure and call [Check]; a change that costs more than budget.txt allows fails them.
package budget

import (
	_ "embed"
	"fmt"
	"strconv"
	"strings"
)

//go:embed budget.txt
var file string

// T is the part of testing.T that Check needs.
type T interface {
	Helper()
	Errorf(format string, args ...any)
	Logf(format string, args ...any)
}

// race says that the race detector is on: sync.Pool forgets at random then, and everything is larger.
var race bool

// Check fails the test if got is more than budget.txt allows under that name. Under the race detector it only tells.
func Check(t T, name string, got float64) {
	t.Helper()
	it, err := find(name)
	switch {
	case err != nil:
		t.Errorf("%v", err)
	case !it.allows(got):
		t.Errorf("%s: %.4g, and the budget is %.4g (%s).\n"+
			"This change costs more than the node may. If it is worth that, put the new number into internal/budget/budget.txt and say why in the commit.",
			name, got, it.limit, it.what)
	default:
		t.Logf("%s: %.4g of %.4g", name, got, it.limit)
	}
}

// Within reports whether Check would pass. It is for what settles: a test waits for it, and then has Check say what is wrong.
func Within(name string, got float64) bool {
	it, err := find(name)
	return err == nil && it.allows(got)
}

// item is one line of the file.
type item struct {
	limit float64
	what  string
}

func (it item) allows(got float64) bool { return got <= it.limit || race }

func find(name string) (item, error) {
	items, err := parse(file)
	if err != nil {
		return item{}, err
	}
	it, ok := items[name]
	if !ok {
		return item{}, fmt.Errorf("internal/budget/budget.txt has no line %q", name)
	}
	return it, nil
}

// parse reads lines of a name, a limit, and what it is; "#" begins a comment.
func parse(s string) (map[string]item, error) {
	items := map[string]item{}
	for i, line := range strings.Split(s, "\n") {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		f := strings.Fields(line)
		if len(f) < 3 {
			return nil, fmt.Errorf("budget: line %d: want a name, a limit and what it is", i+1)
		}
		limit, err := strconv.ParseFloat(f[1], 64)
		if err != nil || limit < 0 {
			return nil, fmt.Errorf("budget: line %d: %q is no limit", i+1, f[1])
		}
		if _, ok := items[f[0]]; ok {
			return nil, fmt.Errorf("budget: line %d: %s comes twice", i+1, f[0])
		}
		items[f[0]] = item{limit, strings.Join(f[2:], " ")}
	}
	return items, nil
}
