package server

import (
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/tailnode/tailnode/internal/derp"
)

// Header names of the captive portal check, docs/protocol/derp.md#http.
const (
	challengeHeader = "X-Tailscale-Challenge"
	responseHeader  = "X-Tailscale-Response"
)

// ServeHTTP serves the relay's paths: /derp (the upgrade; blocks while the connection
// lives), /derp/probe and /derp/latency-check, /generate_204, and a page at /.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/derp":
		s.serveDERP(w, r)
	case "/derp/probe", "/derp/latency-check":
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			http.Error(w, "GET or HEAD only", http.StatusMethodNotAllowed)
			return
		}
		w.Header().Set("Access-Control-Allow-Origin", "*")
	case "/generate_204":
		if c := r.Header.Get(challengeHeader); validChallenge(c) {
			w.Header().Set(responseHeader, "response "+c)
		}
		w.Header().Set("Cache-Control", "no-cache, no-store, must-revalidate, no-transform, max-age=0")
		w.WriteHeader(http.StatusNoContent)
	case "/":
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprint(w, "This is a DERP relay. It carries end-to-end encrypted packets between the nodes of a private network.\n")
	default:
		http.NotFound(w, r)
	}
}

// validChallenge says what may be echoed into a header.
func validChallenge(c string) bool {
	if c == "" || len(c) > 64 {
		return false
	}
	for _, b := range []byte(c) {
		switch {
		case 'a' <= b && b <= 'z', 'A' <= b && b <= 'Z', '0' <= b && b <= '9', b == '.', b == '-', b == '_', b == ':':
		default:
			return false
		}
	}
	return true
}

func (s *Server) serveDERP(w http.ResponseWriter, r *http.Request) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), "DERP") {
		w.Header().Set("Upgrade", "DERP")
		http.Error(w, "DERP requires connection upgrade", http.StatusUpgradeRequired)
		return
	}
	h, ok := w.(http.Hijacker)
	if !ok {
		http.Error(w, "this server cannot upgrade connections (HTTP/2?)", http.StatusInternalServerError)
		return
	}
	nc, brw, err := h.Hijack()
	if err != nil {
		http.Error(w, "cannot upgrade this connection", http.StatusInternalServerError)
		return
	}
	nc.SetDeadline(time.Now().Add(s.cfg.HandshakeTimeout))
	var buffered []byte
	if n := brw.Reader.Buffered(); n > 0 {
		p, _ := brw.Reader.Peek(n)
		buffered = append(buffered, p...)
	}
	if r.Header.Get(derp.FastStartHeader) != "1" {
		raw := s.pub.Raw()
		_, err := fmt.Fprintf(nc, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n"+
			"Derp-Version: %d\r\nDerp-Public-Key: %s\r\n\r\n", derp.Version, hex.EncodeToString(raw[:]))
		if err != nil {
			nc.Close()
			return
		}
	}
	if err := s.Serve(nc, buffered); err != nil {
		s.log.Info("derp: connection ended", "from", r.RemoteAddr, "err", err)
	}
}
