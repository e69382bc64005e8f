package coordstore

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	bolt "go.etcd.io/bbolt"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("COORDSTORE_CHILD"); dir != "" {
		child(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

func open_(t testing.TB, path string) *Store {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func read(t testing.TB, s *Store, b Bucket) map[string]string {
	t.Helper()
	m := map[string]string{}
	if err := s.Load(b, func(k string, v []byte) error { m[k] = string(v); return nil }); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestReadBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := open_(t, path)
	for _, tk := range []Ticket{
		s.Stage(Put(Nodes, "1", "a"), Put(Users, "1", map[string]int{"x": 1})),
		s.Stage(Put(Nodes, "2", "b")),
		s.Stage(Put(Nodes, "1", "c"), Del(Nodes, "2"), Del(Nodes, "never")),
	} {
		if err := tk.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	s.StageLazy(Put(Live, "1", "lazy"))
	if err := s.Close(); err != nil { // commits the lazy write
		t.Fatal(err)
	}
	if err := s.Stage(Put(Nodes, "3", "x")).Wait(); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	s = open_(t, path)
	if m := read(t, s, Nodes); len(m) != 1 || m["1"] != `"c"` {
		t.Errorf("nodes: %v", m)
	}
	if m := read(t, s, Live); m["1"] != `"lazy"` {
		t.Errorf("live: %v", m)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestMemory(t *testing.T) {
	s := NewMemory()
	if err := s.Stage(Put(Nodes, "1", 1)).Wait(); err != nil {
		t.Error(err)
	}
	if m := read(t, s, Nodes); len(m) != 0 {
		t.Errorf("%v", m)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestUnencodable(t *testing.T) {
	s := open_(t, filepath.Join(t.TempDir(), "db"))
	if err := s.Stage(Put(Nodes, "1", make(chan int))).Wait(); err == nil {
		t.Error("no error")
	}
	if err := s.Stage(Put(Nodes, "1", 1)).Wait(); err != nil {
		t.Errorf("one bad record stopped the store: %v", err)
	}
}

// TestTogether stages from many goroutines; a group's atomicity shows in that pairs always agree.
func TestTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := open_(t, path)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			k := strconv.Itoa(i)
			if err := s.Stage(Put(Nodes, k, i), Put(AuthKeys, k, i)).Wait(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(read(t, s, Nodes)) != 64 || len(read(t, s, AuthKeys)) != 64 {
		t.Error("records are missing")
	}
}

func TestInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	open_(t, path)
	if _, err := Open(path); !errors.Is(err, ErrInUse) {
		t.Errorf("err = %v", err)
	}
}

// TestBadFiles opens what is not a sound database of ours. Each must give an error, and stay as it was.
func TestBadFiles(t *testing.T) {
	good := filepath.Join(t.TempDir(), "good")
	s := open_(t, good)
	for i := range 200 {
		if err := s.Stage(Put(Nodes, fmt.Sprintf("%04d", i), strings.Repeat("x", 300))).Wait(); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(t.TempDir(), "foreign")
	db, err := bolt.Open(foreign, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	db.Close()
	other, err := os.ReadFile(foreign)
	if err != nil {
		t.Fatal(err)
	}
	zeroed := append([]byte(nil), whole...)
	clear(zeroed[2*os.Getpagesize():])
	noise := append([]byte(nil), whole...)
	for i := 2 * os.Getpagesize(); i < len(noise); i += 7 {
		noise[i] ^= byte(i)
	}
	for name, b := range map[string][]byte{
		"empty":         {},
		"text":          []byte("this is not a database"),
		"long text":     []byte(strings.Repeat("this is not a database\n", 10000)),
		"torn early":    whole[:100],
		"torn":          whole[:len(whole)/4],
		"zeroed pages":  zeroed,
		"noise":         noise,
		"another bbolt": other,
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "db")
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := Open(path)
			if err == nil {
				s.Close()
			}
			if !errors.Is(err, ErrForeign) {
				t.Errorf("err = %v", err)
			}
			if after, err := os.ReadFile(path); err != nil || string(after) != string(b) {
				t.Error("the file was changed")
			}
		})
	}
	t.Run("folder", func(t *testing.T) {
		if _, err := Open(t.TempDir()); !errors.Is(err, ErrForeign) {
			t.Errorf("err = %v", err)
		}
	})
	t.Run("later schema", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "db")
		s := open_(t, path)
		if err := s.Stage(Put(Meta, "schema", Schema+1)).Wait(); err != nil {
			t.Fatal(err)
		}
		s.Close()
		if _, err := Open(path); !errors.Is(err, ErrSchema) {
			t.Errorf("err = %v", err)
		}
	})
	t.Run("first header torn", func(t *testing.T) { // the second one carries it
		path := filepath.Join(t.TempDir(), "db")
		b := append([]byte(nil), whole...)
		b[60] ^= 0xff // within the meta of page 0: its checksum does not fit any more
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
	})
}

// child writes for ever and prints what was acknowledged.
func child(dir string) {
	s, err := Open(filepath.Join(dir, "db"))
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	n := 0
	s.Load(Nodes, func(string, []byte) error { n++; return nil })
	for i := n; ; i++ {
		k := fmt.Sprintf("%08d", i)
		if err := s.Stage(Put(Nodes, k, i), Put(AuthKeys, k, i)).Wait(); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println(k)
	}
}

// TestKill kills a process that writes, again and again. What it had acknowledged must be there, and pairs whole.
func TestKill(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	acked := map[string]bool{}
	for round := range 12 {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), "COORDSTORE_CHILD="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			if strings.HasPrefix(lines.Text(), "error") {
				t.Fatal(lines.Text())
			}
			acked[lines.Text()] = true
			if n == 5+round*7 {
				cmd.Process.Kill() // SIGKILL; what is printed after this line is acknowledged too
			}
		}
		cmd.Wait()
		s, err := Open(filepath.Join(dir, "db"))
		if err != nil {
			t.Fatal(err)
		}
		nodes, keys := read(t, s, Nodes), read(t, s, AuthKeys)
		s.Close()
		if len(nodes) != len(keys) {
			t.Fatalf("a batch was torn: %d and %d records", len(nodes), len(keys))
		}
		for k := range acked {
			var i int
			if err := json.Unmarshal([]byte(nodes[k]), &i); err != nil || fmt.Sprintf("%08d", i) != k {
				t.Fatalf("acknowledged record %s is lost: %q", k, nodes[k])
			}
		}
	}
	if len(acked) < 100 {
		t.Errorf("only %d records were written", len(acked))
	}
}

func BenchmarkStage(b *testing.B) {
	s := open_(b, filepath.Join(b.TempDir(), "db"))
	b.SetParallelism(50)
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			if err := s.Stage(Put(Nodes, strconv.Itoa(i%1000), strings.Repeat("x", 500))).Wait(); err != nil {
				b.Error(err)
			}
		}
	})
}
