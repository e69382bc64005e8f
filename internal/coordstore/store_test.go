package coordstore

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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

// TestNoChanges stages nothing: the ticket stands for what was staged before, and tells of a store that has failed.
func TestNoChanges(t *testing.T) {
	s := open_(t, filepath.Join(t.TempDir(), "db"))
	if err := s.Stage().Wait(); err != nil {
		t.Error(err)
	}
	tx, err := s.db.Begin(true) // commits wait for its end
	if err != nil {
		t.Fatal(err)
	}
	first := s.Stage(Put(Nodes, "1", 1))
	again := s.Stage()
	if again != first {
		t.Error("nothing to wait for while a write is pending")
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if err := again.Wait(); err != nil {
		t.Error(err)
	}
	s.db.Close() // the next commit fails
	if err := s.Stage(Put(Nodes, "2", 2)).Wait(); err == nil {
		t.Fatal("the store does not fail")
	}
	if err := s.Stage().Wait(); err == nil || err != s.Err() {
		t.Errorf("after a failed commit: %v", err)
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

// pagesOf calls f with each page of a kind that a database has.
func pagesOf(b []byte, kind uint16, f func(id int, page []byte)) {
	size := os.Getpagesize()
	for id := 2; id < len(b)/size; id++ {
		if p := b[id*size:]; ne.Uint64(p) == uint64(id) && ne.Uint16(p[8:]) == kind {
			f(id, p[:size])
		}
	}
}

// TestDamagedPages damages single fields of pages, and bytes at random. An error must come of it, never a crash; what is
// not noticed must be harmless.
func TestDamagedPages(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := open_(t, path)
	for i := range 200 {
		tk := s.Stage(Put(Nodes, fmt.Sprintf("%04d", i), strings.Repeat("x", 300+i%7*900)))
		if i%40 == 0 {
			tk.Wait()
			s.Stage(Del(Nodes, fmt.Sprintf("%04d", i/2))).Wait()
		}
	}
	s.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	reopen := func(b []byte) error {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(path)
		if err != nil {
			return err
		}
		for _, b := range buckets {
			read(t, s, b)
		}
		return s.Close()
	}
	if err := reopen(whole); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		kind uint16
		do   func(id int, page []byte)
	}{
		{"a key far away", leafPage, func(_ int, p []byte) { ne.PutUint32(p[pageHeader+4:], 0x7fff0000) }},
		{"a long key", leafPage, func(_ int, p []byte) { ne.PutUint32(p[pageHeader+8:], 0x7fff0000) }},
		{"a long value", leafPage, func(_ int, p []byte) { ne.PutUint32(p[pageHeader+12:], 0x7fff0000) }},
		{"no key", leafPage, func(_ int, p []byte) { ne.PutUint32(p[pageHeader+8:], 0) }},
		{"many records", leafPage, func(_ int, p []byte) { ne.PutUint16(p[10:], 0xffff) }},
		{"a long page", leafPage, func(_ int, p []byte) { ne.PutUint32(p[12:], 0x7fff0000) }},
		{"a bucket of nothing", leafPage, func(_ int, p []byte) { ne.PutUint32(p[pageHeader:], bucketFlag); ne.PutUint32(p[pageHeader+12:], 1) }},
		{"a branch's key far away", branchPage, func(_ int, p []byte) { ne.PutUint32(p[pageHeader:], 0x7fff0000) }},
		{"a branch that is its own child", branchPage, func(id int, p []byte) { ne.PutUint64(p[pageHeader+8:], uint64(id)) }},
		{"a child beyond the end", branchPage, func(_ int, p []byte) { ne.PutUint64(p[pageHeader+8:], 1<<40) }},
		{"an empty branch", branchPage, func(_ int, p []byte) { ne.PutUint16(p[10:], 0) }},
		{"two children exchanged", branchPage, func(_ int, p []byte) {
			a, b := p[pageHeader+8:], p[pageHeader+elementSize+8:]
			x, y := ne.Uint64(a), ne.Uint64(b)
			ne.PutUint64(a, y)
			ne.PutUint64(b, x)
		}},
		{"a list of more free pages than there are", freelistPage, func(_ int, p []byte) { ne.PutUint16(p[10:], 0xffff); ne.PutUint64(p[pageHeader:], 1<<40) }},
		{"a free page that is in use", freelistPage, func(id int, p []byte) { ne.PutUint16(p[10:], 1); ne.PutUint64(p[pageHeader:], uint64(id)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			found := false
			pagesOf(whole, c.kind, func(id int, _ []byte) {
				if found { // a page before may have been a free one
					return
				}
				b, size := slices.Clone(whole), os.Getpagesize()
				c.do(id, b[id*size:(id+1)*size])
				found = errors.Is(reopen(b), ErrForeign)
			})
			if !found {
				t.Error("not noticed")
			}
		})
	}
	size, rounds := os.Getpagesize(), 150
	if testing.Short() {
		rounds = 30
	}
	for seed := range rounds {
		r := rand.New(rand.NewPCG(uint64(seed), 1))
		b, pages := slices.Clone(whole), len(whole)/size
		switch seed % 3 {
		case 0: // some bytes
			for range 1 + r.IntN(4) {
				b[2*size+r.IntN(len(b)-2*size)] ^= byte(1 + r.IntN(255))
			}
		case 1: // some bytes of page headers or elements
			for range 1 + r.IntN(3) {
				b[(2+r.IntN(pages-2))*size+r.IntN(64)] ^= byte(1 + r.IntN(255))
			}
		case 2: // a page in the place of another
			p, q := 2+r.IntN(pages-2), 2+r.IntN(pages-2)
			copy(b[p*size:(p+1)*size], whole[q*size:])
		}
		if err := reopen(b); err != nil && !errors.Is(err, ErrForeign) {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
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
