package coord

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/tailnode/tailnode/internal/control"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// TestControlClient runs this module's own control client against the server, over HTTP and over TLS.
func TestControlClient(t *testing.T) {
	certs := httptest.NewUnstartedServer(http.NotFoundHandler())
	certs.StartTLS()
	defer certs.Close()
	for _, c := range []struct {
		name           string
		server, client *tls.Config
	}{
		{"http", nil, nil},
		{"https", &tls.Config{Certificates: certs.TLS.Certificates}, &tls.Config{RootCAs: certs.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs, ServerName: "example.com"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := startServer(t, &Server{TLSConfig: c.server})
			cl, err := control.New(control.Config{ServerURL: s.BaseURL(), MachineKey: key.NewMachine(), TLSConfig: c.client})
			must(t, err)
			defer cl.Close()
			node := key.NewNode().Public()
			hi := &tailcfg.Hostinfo{Hostname: "ours"}
			var refused *control.RegisterError
			for tries := 0; tries < 5 && !errors.As(err, &refused); tries++ { // as for post
				_, err = cl.Register(t.Context(), &tailcfg.RegisterRequest{NodeKey: node, Hostinfo: hi, Auth: &tailcfg.RegisterResponseAuth{AuthKey: "wrong"}})
			}
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), "invalid auth key") {
				t.Errorf("wrong key: %v", err)
			}
			res, err := cl.Register(t.Context(), &tailcfg.RegisterRequest{NodeKey: node, Hostinfo: hi, Auth: &tailcfg.RegisterResponseAuth{AuthKey: newKey(t, s, AuthKeyOptions{})}})
			if err != nil || !res.MachineAuthorized {
				t.Fatalf("%+v, %v", res, err)
			}
			done := errors.New("seen enough")
			updated := false
			err = cl.Map(t.Context(), &tailcfg.MapRequest{NodeKey: node, Hostinfo: hi}, func(m *tailcfg.MapResponse) error {
				switch {
				case m.Node != nil && m.Node.HomeDERP == 3:
					return done
				case m.Node != nil && !updated:
					updated = true
					return cl.Update(t.Context(), &tailcfg.MapRequest{NodeKey: node, Hostinfo: &tailcfg.Hostinfo{Hostname: "ours", NetInfo: &tailcfg.NetInfo{PreferredDERP: 3}}})
				}
				return nil
			})
			if !errors.Is(err, done) {
				t.Errorf("map: %v", err)
			}
		})
	}
}

// childMain is the process that TestKill kills: it makes auth keys for ever and prints them.
func childMain(dir string) {
	s := &Server{Dir: dir}
	if err := s.Start(context.Background()); err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for {
		k, err := s.CreateAuthKey(AuthKeyOptions{})
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println(k)
	}
}

// TestKill kills a server with -9 while it works. Every auth key that it gave out is good afterwards, and another server starts on
// the folder as if nothing had happened.
func TestKill(t *testing.T) {
	exe := must2(os.Executable())
	dir := t.TempDir()
	var keys []string
	for round := range 4 {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), "COORD_CHILD="+dir)
		out := must2(cmd.StdoutPipe())
		must(t, cmd.Start())
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			if strings.HasPrefix(lines.Text(), "error") {
				t.Fatal(lines.Text())
			}
			keys = append(keys, lines.Text())
			if n == 3+9*round {
				cmd.Process.Kill()
			}
		}
		cmd.Wait()
	}
	s := startServer(t, &Server{Dir: dir})
	for _, k := range keys {
		rec := s.net.keys[AuthKeyID(k)]
		if rec == nil {
			t.Fatalf("auth key %s was acknowledged and is lost", AuthKeyID(k))
		}
	}
	newPeer(t, s, "p").join(keys[len(keys)-1])
	newPeer(t, s, "p").join(keys[0])
}
