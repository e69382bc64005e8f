package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tailnode/tailnode/internal/netcheck"
	"github.com/tailnode/tailnode/relay"
)

// TestNetcheck measures the relays of a node that runs, of one that joins, of a file and of a server. It never asks the
// router of the machine that it runs on.
func TestNetcheck(t *testing.T) {
	lab(t)
	dir := filepath.Join(t.TempDir(), "a")
	up, stop := background(t, "up", "--dir", dir, "--hostname", "alpha")
	up.await(t, "Ctrl-C")
	wait := patience.String()
	code, out, errs := command(t, "", "netcheck", "--no-port-map", "--wait", wait, "--dir", dir)
	if code != 0 || !strings.Contains(errs, "the node that runs") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	for _, want := range []string{"UDP:", "works", "IPv4:", "yes, 127.0.0.1:", "Hairpin:", "Port mapping:", "not known", "Captive portal:", "Nearest relay:", " ms"} {
		if !strings.Contains(out, want) {
			t.Errorf("the output does not hold %q:\n%s", want, out)
		}
	}
	stop()
	code, out, errs = command(t, "", "netcheck", "--no-port-map", "--wait", wait, "--json", "--dir", dir)
	var r netcheck.Report
	if err := json.Unmarshal([]byte(out), &r); code != 0 || err != nil || strings.Contains(errs, "Measuring") || !r.UDP || !r.IPv4 || r.PCP != "" || r.Hairpin == "" || len(r.Latency) != 1 || r.Latency[r.Home] <= 0 {
		t.Errorf("exit code %d, %v: %s%s", code, err, out, errs)
	}
}

func TestNetcheckWithoutNode(t *testing.T) {
	rs := &relay.Server{Addr: "127.0.0.1:0"}
	if err := rs.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rs.Close() })
	region := rs.Region(7)
	dm, err := json.Marshal(map[string]any{"Regions": map[int]any{7: region}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "map.json")
	if err := os.WriteFile(file, dm, 0o600); err != nil {
		t.Fatal(err)
	}
	hs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/derpmap/default" {
			http.NotFound(w, r)
			return
		}
		w.Write(dm)
	}))
	defer hs.Close()
	t.Setenv("TS_CONTROL_URL", hs.URL)
	empty := filepath.Join(t.TempDir(), "none")
	for _, tt := range []struct {
		name string
		args []string
		code int
		say  string
	}{
		{"a file", []string{"--derp-map", file}, 0, "map.json"},
		{"a URL", []string{"--derp-map", hs.URL + "/derpmap/default"}, 0, hs.URL},
		{"the public map", nil, 0, hs.URL},
		{"no such URL", []string{"--derp-map", hs.URL + "/x"}, exitFailure, "404"},
		{"no such file", []string{"--derp-map", file + "x"}, exitFailure, "no such file"},
		{"no public map", []string{"--control-url", hs.URL + "/x"}, exitFailure, "--derp-map"},
		{"not a map", []string{"--derp-map", os.Args[0]}, exitFailure, "not understood"},
		{"an argument", []string{"x"}, exitUsage, "no argument"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, out, errs := command(t, "", append([]string{"netcheck", "--no-port-map", "--wait", patience.String(), "--dir", empty}, tt.args...)...)
			if code != tt.code || !strings.Contains(errs, tt.say) || code == 0 && !strings.Contains(out, "works") {
				t.Errorf("exit code %d: %s%s", code, out, errs)
			}
		})
	}
	if _, err := os.Stat(empty); err == nil {
		t.Error("a node was made")
	}
}
