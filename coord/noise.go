package coord

import (
	"encoding/json"
	"html"
	"io"
	"net/http"
	"net/netip"
	"strings"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// enter counts the caller among those that Close waits for, unless the server does not run.
func (s *Server) enter() bool {
	if s.lock() != nil {
		return false
	}
	s.wg.Add(1)
	s.mu.Unlock()
	return true
}

// counted makes Close wait for h's requests.
func (s *Server) counted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.enter() {
			http.Error(w, "coordination server is not running", http.StatusServiceUnavailable)
			return
		}
		defer s.wg.Done()
		h.ServeHTTP(w, r)
	})
}

// publicMux serves what is outside Noise.
func (s *Server) publicMux() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /key", s.serveKey)
	mux.Handle("POST /ts2021", s.noise)
	mux.HandleFunc("GET /register/{id}", s.servePage)
	mux.HandleFunc("POST /relay/admit", s.serveAdmit)
	mux.HandleFunc("HEAD /ping/{token}", s.servePong)
	mux.HandleFunc("POST /ping/{token}", s.servePong)
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "This is the coordination server of a tailnet. Point a node's control URL here.\n")
	})
	return s.counted(mux)
}

// innerMux serves what is inside Noise.
func (s *Server) innerMux() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /machine/register", s.serveRegister)
	mux.HandleFunc("POST /machine/map", s.serveMap)
	mux.HandleFunc("HEAD /ping/{token}", s.servePong)
	mux.HandleFunc("POST /ping/{token}", s.servePong)
	mux.HandleFunc("POST /machine/update-health", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusNoContent) // nothing is done with it
	})
	mux.HandleFunc("/machine/", func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "this coordination server does not offer "+r.URL.Path, http.StatusNotImplemented)
	})
	return s.counted(mux)
}

// serveKey answers with the Noise public key (docs/protocol/control.md § The server's key).
func (s *Server) serveKey(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(&tailcfg.PublicKeyResponse{PublicKey: s.net.srv.Key.Public()})
}

// remoteIP returns the address that r came from, as far as it is known.
func remoteIP(r *http.Request) netip.Addr {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}

// readJSON decodes r's body of at most limit bytes into v, or answers with an error.
func readJSON(w http.ResponseWriter, r *http.Request, limit int64, v any) bool {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		http.Error(w, "request body is too large or was cut off", http.StatusBadRequest)
		return false
	}
	if err := json.Unmarshal(b, v); err != nil {
		http.Error(w, "request body is not the JSON expected: "+err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// servePage is what the person sees who follows a login URL. It approves nothing: that takes the
// Go API or the administrator's command, so there is nothing here for another site to forge.
func (s *Server) servePage(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "no-referrer")
	s.mu.Lock()
	l := s.logins[id]
	text := "This login is not known here. It may have expired: start it again on the node."
	switch {
	case l == nil:
	case l.outcome == loginApproved:
		text = "This node has been approved. You can close this page."
	case l.outcome == loginPending:
		text = "To let the node \u201c" + l.req.hostname() + "\u201d into the tailnet, its administrator runs:"
	}
	pending := l != nil && l.outcome == loginPending
	tags := ""
	if pending {
		tags = strings.Join(l.req.requestTags(), ", ")
	}
	s.mu.Unlock()
	if l == nil {
		w.WriteHeader(http.StatusNotFound)
	}
	body := "<p>" + html.EscapeString(text) + "</p>"
	if pending {
		body += "<pre>tailnode control approve " + html.EscapeString(id) + "</pre><p>The node goes on by itself then.</p>"
		if tags != "" {
			body += "<p>It asks for the tags " + html.EscapeString(tags) + ", which it gets if <code>--requested-tags</code> is added.</p>"
		}
	}
	io.WriteString(w, `<!doctype html><meta charset="utf-8"><title>Join the tailnet</title>`+
		`<style>body{font:16px/1.5 sans-serif;max-width:40em;margin:4em auto;padding:0 1em}pre{background:#eee;padding:1em}</style>`+
		`<h1>Join the tailnet</h1>`+body)
}
