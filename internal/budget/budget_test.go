package budget

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// minimal is the least that a program does with a node; the benchmark weighs the same beside upstream's.
const minimal = "../../bench/min/ours/main.go"

// fixed is the environment of every build that is weighed, so that it does not matter where it is made.
func fixed(cmd *exec.Cmd) *exec.Cmd {
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOAMD64=v1", "GOFLAGS=", "GOEXPERIMENT=")
	return cmd
}

func goTool(t *testing.T) string {
	if _, err := os.Stat(minimal); err != nil {
		t.Skip("the benchmark's minimal program is not here:", err)
	}
	tool, err := exec.LookPath("go")
	if err != nil {
		t.Skip(err)
	}
	return tool
}

// since is the version of Go with which budget.txt was last measured. With another the linker's work differs, which is nobody's fault here.
const since = "go1.26"

func TestSize(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a program")
	}
	out := filepath.Join(t.TempDir(), "minimal")
	cmd := fixed(exec.Command(goTool(t), "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, minimal))
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	fi, err := os.Stat(out)
	if err != nil {
		t.Fatal(err)
	}
	mb := float64(fi.Size()) / 1e6
	if !strings.HasPrefix(runtime.Version(), since) {
		t.Logf("%.2f MB with %s; the budget is for %s, and 5 %% more are allowed", mb, runtime.Version(), since)
		mb /= 1.05
	}
	Check(t, "size.stripped", mb)
}

func TestPackages(t *testing.T) {
	cmd := fixed(exec.Command(goTool(t), "list", "-deps", "-f", "{{.ImportPath}} {{.Standard}}", minimal))
	cmd.Stderr = os.Stderr
	b, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var outside []string
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutSuffix(strings.TrimSpace(line), " false"); ok {
			outside = append(outside, name)
		}
	}
	outside = outside[:len(outside)-1] // the program itself
	Check(t, "packages.all", float64(strings.Count(string(b), "\n")-1))
	Check(t, "packages.outside-std", float64(len(outside)))
	if t.Failed() {
		t.Logf("outside of the standard library:\n\t%s", strings.Join(outside, "\n\t"))
	}
}

// TestEveryLineIsChecked looks for the call that measures each line of budget.txt.
func TestEveryLineIsChecked(t *testing.T) {
	items, err := parse(file)
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != "../.." || d.Name() == "target" || d.Name() == "build") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for name := range items {
			if strings.Contains(string(b), fmt.Sprintf("Check(t, %q", name)) {
				delete(items, name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range items {
		t.Errorf("no test checks %s", name)
	}
}

type fake struct{ failed []string }

func (f *fake) Helper()                      {}
func (f *fake) Logf(string, ...any)          {}
func (f *fake) Errorf(s string, args ...any) { f.failed = append(f.failed, fmt.Sprintf(s, args...)) }

func TestCheck(t *testing.T) {
	defer func(was bool) { race = was }(race)
	race = false
	for _, tt := range []struct {
		name string
		got  float64
		want string // in the failure; "": none
	}{
		{"allocs.wg.seal", 0, ""},
		{"allocs.wg.seal", 1, "budget.txt"},
		{"allocs.datagram", 7.5, "the budget is 7"},
		{"no.such", 0, "no line"},
	} {
		var f fake
		Check(&f, tt.name, tt.got)
		if got := strings.Join(f.failed, "\n"); (got != "") != (tt.want != "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s %v: %q, want %q", tt.name, tt.got, got, tt.want)
		}
	}
}

func TestParse(t *testing.T) {
	for s, ok := range map[string]bool{
		"": true, "# x\n\na 1 of something\n": true, "a 1": false, "a one of it": false, "a -1 of it": false, "a 1 x\na 2 x": false,
	} {
		if _, err := parse(s); (err == nil) != ok {
			t.Errorf("%q: %v", s, err)
		}
	}
}
