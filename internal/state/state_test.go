package state

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

const childEnv = "TAILNODE_STATE_TEST_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		child(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

// child opens the store and writes until it is killed, telling each write once
// it is done.
func child(dir string) {
	f, err := OpenFile(dir)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for i := 0; ; i++ {
		// Two values that must always agree, and a size that varies.
		v := []byte(fmt.Sprintf("%d %s", i, strings.Repeat("x", i%5000)))
		if err := f.WriteState("count", v); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println("wrote", i)
	}
}

func startChild(t *testing.T, dir string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewScanner(out)
}

func open(t *testing.T, dir string) *File {
	t.Helper()
	f, err := OpenFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestStores(t *testing.T) {
	user := map[string][]byte{}
	for name, s := range map[string]Store{
		"memory": NewMemory(),
		"file":   open(t, t.TempDir()),
		"adapted": Adapt(func(id string) ([]byte, error) { return user[id], nil },
			func(id string, v []byte) error { user[id] = v; return nil }),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := s.ReadState("k"); !errors.Is(err, ErrNotExist) || !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("missing: %v", err)
			}
			v := []byte("secret \x00\xff")
			if err := s.WriteState("k", v); err != nil {
				t.Fatal(err)
			}
			v[0] = 'X'
			got, err := s.ReadState("k")
			if err != nil || string(got) != "secret \x00\xff" {
				t.Errorf("%q %v", got, err)
			}
			got[0] = 'X'
			if got, _ := s.ReadState("k"); string(got) != "secret \x00\xff" {
				t.Error("the value given out is not the caller's own")
			}
			if err := s.WriteState("k", nil); err != nil {
				t.Fatal(err)
			}
			if _, err := s.ReadState("k"); !errors.Is(err, ErrNotExist) {
				t.Errorf("removed: %v", err)
			}
			var wg sync.WaitGroup
			for i := range 4 {
				wg.Go(func() {
					for j := range 10 {
						s.WriteState(fmt.Sprint(i), []byte{byte(j)})
						s.ReadState("0")
					}
				})
			}
			wg.Wait()
		})
	}
}

func TestAdaptErrors(t *testing.T) {
	disk := errors.New("disk on fire")
	s := Adapt(func(string) ([]byte, error) { return nil, disk }, func(string, []byte) error { return disk })
	if _, err := s.ReadState("k"); !errors.Is(err, disk) || errors.Is(err, ErrNotExist) {
		t.Errorf("read: %v", err)
	}
	if err := s.WriteState("k", []byte("secret")); !errors.Is(err, disk) || strings.Contains(err.Error(), "secret") {
		t.Errorf("write: %v", err)
	}
	s = Adapt(func(string) ([]byte, error) { return nil, os.ErrNotExist }, nil)
	if _, err := s.ReadState("k"); !errors.Is(err, ErrNotExist) {
		t.Errorf("the user's not-exist: %v", err)
	}
}

func TestFileSurvives(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	f := open(t, dir)
	for i := range 20 {
		if err := f.WriteState(fmt.Sprint("k", i), []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if runtime.GOOS != "windows" {
		for path, want := range map[string]fs.FileMode{dir: 0o700, filepath.Join(dir, FileName): 0o600, filepath.Join(dir, lockName): 0o600} {
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
				t.Errorf("%s: %v %v", path, info.Mode(), err)
			}
		}
	}
	for range 2 {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.ReadState("k1"); !errors.Is(err, ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
	if err := f.WriteState("k1", nil); !errors.Is(err, ErrClosed) {
		t.Errorf("write after Close: %v", err)
	}
	f = open(t, dir)
	for i := range 20 {
		if v, err := f.ReadState(fmt.Sprint("k", i)); err != nil || !bytes.Equal(v, []byte{byte(i)}) {
			t.Errorf("%d: %v %v", i, v, err)
		}
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 2 {
		t.Errorf("left over: %v", entries)
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir)
	_, err := OpenFile(dir)
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "this process") {
		t.Errorf("in this process: %v", err)
	}
	cmd, out := startChild(t, dir)
	if !out.Scan() || !strings.HasPrefix(out.Text(), "error state: directory is in use: "+dir) || !strings.Contains(out.Text(), fmt.Sprint("process ", os.Getpid())) {
		t.Errorf("another process: %s", out.Text())
	}
	cmd.Wait()
	if err := f.WriteState("k", []byte("v")); err != nil {
		t.Errorf("the first store is hurt: %v", err)
	}
	f.Close()
	open(t, dir)
}

// TestKill kills a writer at some moment, again and again: what it said was
// written is there, the file is whole, and the lock is gone with it.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	for round := range 8 {
		cmd, out := startChild(t, dir)
		said := -1
		for n := 0; n < 3+7*round && out.Scan(); n++ {
			if _, err := fmt.Sscanf(out.Text(), "wrote %d", &said); err != nil {
				t.Fatal(out.Text())
			}
		}
		if _, err := OpenFile(dir); !errors.Is(err, ErrLocked) {
			t.Errorf("while it runs: %v", err)
		}
		cmd.Process.Kill()
		for out.Scan() {
			fmt.Sscanf(out.Text(), "wrote %d", &said)
		}
		cmd.Wait()
		f, err := OpenFile(dir)
		if err != nil {
			t.Fatal(err)
		}
		v, err := f.ReadState("count")
		var got int
		fmt.Sscanf(string(v), "%d ", &got)
		if err != nil || got < said || got > said+1 || len(v) != len(fmt.Sprint(got))+1+got%5000 {
			t.Errorf("said %d, kept %d (%d bytes): %v", said, got, len(v), err)
		}
		f.Close()
	}
}

func TestBadFiles(t *testing.T) {
	const secret = "c2VjcmV0" // "secret"
	good := `{"format":"tailnode-state","version":1,"values":{"k":"` + secret + `"}}`
	for name, tt := range map[string]struct {
		content string
		want    error
	}{
		"empty":         {"", ErrCorrupt},
		"torn":          {good[:len(good)-6], ErrCorrupt},
		"zeros":         {string(make([]byte, 100)), ErrCorrupt},
		"not base64":    {strings.Replace(good, secret, secret+"!", 1), ErrCorrupt},
		"foreign JSON":  {`{"_machinekey":"` + secret + `"}`, ErrCorrupt},
		"other format":  {strings.Replace(good, "tailnode-state", "x", 1), ErrCorrupt},
		"no version":    {`{"format":"tailnode-state"}`, ErrCorrupt},
		"newer":         {strings.Replace(good, `"version":1`, `"version":2`, 1), ErrVersion},
		"two documents": {good + good, ErrCorrupt},
		"wrong type":    {`{"format":"tailnode-state","version":1,"values":"` + secret + `"}`, ErrCorrupt},
		"too large":     {good + strings.Repeat(" ", maxSize), ErrCorrupt},
		"array":         {`["` + secret + `"]`, ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, FileName)
			if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second time too: the lock was released
				_, err := OpenFile(dir)
				if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), secret) {
					t.Errorf("%v", err)
				}
			}
			if b, err := os.ReadFile(path); err != nil || string(b) != tt.content {
				t.Error("the file was changed")
			}
		})
	}
}

func TestOddPlaces(t *testing.T) {
	t.Run("directory instead of the file", func(t *testing.T) {
		dir := t.TempDir()
		os.Mkdir(filepath.Join(dir, FileName), 0o700)
		if _, err := OpenFile(dir); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "directory") {
			t.Error(err)
		}
	})
	t.Run("link instead of the file", func(t *testing.T) {
		dir := t.TempDir()
		if os.Symlink("elsewhere", filepath.Join(dir, FileName)) != nil {
			t.Skip("no links here")
		}
		if _, err := OpenFile(dir); !errors.Is(err, ErrCorrupt) {
			t.Error(err)
		}
	})
	t.Run("file instead of the directory", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "f")
		os.WriteFile(path, nil, 0o600)
		if _, err := OpenFile(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Error(err)
		}
	})
	t.Run("no directory", func(t *testing.T) {
		if _, err := OpenFile(""); err == nil {
			t.Error("taken")
		}
	})
	t.Run("readable by others", func(t *testing.T) {
		if runtime.GOOS == "windows" {
			t.Skip("no modes here")
		}
		dir := t.TempDir()
		path := filepath.Join(dir, FileName)
		os.WriteFile(path, []byte(`{"format":"tailnode-state","version":1}`), 0o644)
		open(t, dir)
		if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v", info.Mode())
		}
	})
	t.Run("left by a killed writer", func(t *testing.T) {
		dir := t.TempDir()
		temp := filepath.Join(dir, tempName)
		os.WriteFile(temp, []byte("half"), 0o600)
		f := open(t, dir)
		if _, err := os.Stat(temp); !errors.Is(err, fs.ErrNotExist) {
			t.Error("still there")
		}
		// A link planted there must not be followed.
		target := filepath.Join(t.TempDir(), "target")
		os.WriteFile(target, []byte("precious"), 0o600)
		if os.Symlink(target, temp) == nil {
			if err := f.WriteState("k", []byte("v")); err != nil {
				t.Fatal(err)
			}
			if b, _ := os.ReadFile(target); string(b) != "precious" {
				t.Error("a link was followed")
			}
		}
	})
}

// TestFailedWrite: the store holds what it held before.
func TestFailedWrite(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir)
	if err := f.WriteState("k", []byte("old")); err != nil {
		t.Fatal(err)
	}
	if err := f.WriteState("k", bytes.Repeat([]byte("secret"), maxSize/6)); err == nil || strings.Contains(err.Error(), "secret") || len(err.Error()) > 500 {
		t.Errorf("too large: %v", err)
	}
	// Something in the way of the temporary file that cannot be removed.
	if err := os.MkdirAll(filepath.Join(dir, tempName, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, v := range [][]byte{[]byte("new"), nil} {
		if err := f.WriteState("k", v); err == nil {
			t.Error("written")
		}
	}
	if err := f.WriteState("other", []byte("v")); err == nil {
		t.Error("written")
	}
	if v, err := f.ReadState("k"); err != nil || string(v) != "old" {
		t.Errorf("%q %v", v, err)
	}
	if _, err := f.ReadState("other"); !errors.Is(err, ErrNotExist) {
		t.Error(err)
	}
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(`{"format":"tailnode-state","version":1,"values":{"k":"c2VjcmV0"}}`))
	f.Add([]byte(`{"format":"tailnode-state","version":99999999999999999999}`))
	f.Add([]byte(`[`))
	path := filepath.Join(f.TempDir(), FileName)
	f.Fuzz(func(t *testing.T, b []byte) {
		os.WriteFile(path, b, 0o600)
		if m, err := load(path); err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) || (m == nil) != (err != nil) {
			t.Fatalf("%v %v", m, err)
		}
	})
}
