package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

const (
	pingTimeout = 15 * time.Second
	maxC2N      = 1 << 20 // of a request's body and of its answer
	maxPings    = 8       // at a time; each may be a connection to wherever the server says
)

// ping answers a PingRequest on a goroutine of its own, or reports false where too many are being answered.
func (s *Session) ping(p *tailcfg.PingRequest) bool {
	select {
	case s.pings <- struct{}{}:
	default:
		s.log.Debug("control: too many pings at a time", "types", p.Types)
		return false
	}
	s.helper.Go(func() {
		defer func() { <-s.pings }()
		ctx, cancel := context.WithTimeout(s.ctx, pingTimeout)
		defer cancel()
		if err := s.client.AnswerPing(ctx, p, s.h.Ping); err != nil {
			s.log.Debug("control: answering a ping", "types", p.Types, "err", err)
		}
	})
	return true
}

// AnswerPing does what a PingRequest asks: with no Types it fetches the URL by HEAD, with
// "c2n" it answers the HTTP request in Payload, and for every other type it calls ping with
// that type alone and posts the answer. It blocks until all is done or ctx ends.
func (c *Client) AnswerPing(ctx context.Context, p *tailcfg.PingRequest, ping func(context.Context, *tailcfg.PingRequest) (*tailcfg.PingResponse, error)) error {
	switch {
	case p.URL == "":
		return fmt.Errorf("control: a ping request without a URL")
	case p.Types == "":
		return c.answer(ctx, http.MethodHead, p.URL, nil, p.URLIsNoise)
	case p.Types == "c2n":
		// The answer may hold what only control should see, so it goes through the channel.
		return c.answer(ctx, http.MethodPost, p.URL, c2n(p.Payload), true)
	}
	if !p.IP.IsValid() || ping == nil {
		return fmt.Errorf("control: cannot answer a ping of types %q", p.Types)
	}
	var first error
	for kind := range strings.SplitSeq(p.Types, ",") {
		switch kind {
		case "TSMP", "ICMP", "disco", "peerapi":
		default:
			continue
		}
		one := *p
		one.Types = kind
		r, err := ping(ctx, &one)
		if err != nil {
			r = &tailcfg.PingResponse{Type: kind, IP: p.IP.String(), Err: err.Error()}
		}
		if r == nil {
			continue
		}
		if r.Type == "" {
			r.Type = kind
		}
		body, err := json.Marshal(r)
		if err == nil {
			err = c.answer(ctx, http.MethodPost, p.URL, body, p.URLIsNoise)
		}
		if err != nil && first == nil {
			first = err
		}
	}
	return first
}

// answer makes a request to a URL that control named, within the channel or outside.
func (c *Client) answer(ctx context.Context, method, url string, body []byte, inside bool) error {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("control: ping: %w", err)
	}
	do := c.outer.RoundTrip
	if inside {
		// Whatever host the URL names: there is only one at the other end.
		do = c.do
		req.URL.Scheme, req.URL.Host = "https", c.base.Host
	}
	resp, err := do(req)
	if err != nil {
		return fmt.Errorf("control: ping: %w", err)
	}
	io.Copy(io.Discard, io.LimitReader(resp.Body, maxErrorText))
	resp.Body.Close()
	return nil
}

// c2n answers the HTTP request in payload, from control to the node, and returns the answer as
// it goes over the wire. It knows /echo; the rest gets the answer that a client without the
// feature gives.
func c2n(payload []byte) []byte {
	status, body := c2nAnswer(payload)
	resp := &http.Response{
		StatusCode: status, ProtoMajor: 1, ProtoMinor: 1,
		Header:        http.Header{"Content-Type": {"text/plain; charset=utf-8"}},
		Body:          io.NopCloser(bytes.NewReader(body)),
		ContentLength: int64(len(body)),
	}
	var b bytes.Buffer
	resp.Write(&b)
	return b.Bytes()
}

func c2nAnswer(payload []byte) (status int, body []byte) {
	req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(payload)))
	if err != nil {
		return http.StatusBadRequest, []byte("malformed request\n")
	}
	if req.URL.Path != "/echo" {
		return http.StatusBadRequest, []byte("unknown c2n path\n")
	}
	body, err = io.ReadAll(io.LimitReader(req.Body, maxC2N))
	if err != nil {
		return http.StatusBadRequest, []byte("malformed body\n")
	}
	return http.StatusOK, body
}
