package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Register registers the node. It blocks until the server answered, which for a request with
// Followup is when somebody visited that URL, or until ctx ends. A zero Version is filled in.
//
// A refusal is a *RegisterError with the server's own words; 429 and 503 are a
// *RateLimitError; another HTTP status is an *HTTPError. An answer with AuthURL, with
// NodeKeyExpired or without MachineAuthorized is no error.
func (c *Client) Register(ctx context.Context, req *tailcfg.RegisterRequest) (*tailcfg.RegisterResponse, error) {
	const path = "/machine/register"
	r := *req
	if r.Version == 0 {
		r.Version = c.cfg.Version
	}
	resp, err := c.post(ctx, path, &r, r.OldNodeKey, r.NodeKey)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		err := httpError(path, resp, time.Now())
		if h, ok := errors.AsType[*HTTPError](err); ok && h.Text != "" && h.Status >= 400 && h.Status < 500 && h.Status != http.StatusRequestTimeout {
			// Some servers refuse by status. A long poll that ran out is no refusal.
			h.Text = withoutKey(&r, h.Text)
			return nil, fmt.Errorf("%w (%w)", &RegisterError{Message: h.Text, Terminal: r.Followup == ""}, h)
		}
		return nil, err
	}
	b, err := readReply(resp)
	if err != nil {
		return nil, fmt.Errorf("control: %s: reading the answer: %w", path, err)
	}
	var out tailcfg.RegisterResponse
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, fmt.Errorf("control: %s: malformed answer %s: %w", path, excerpt(b), err)
	}
	if out.Error != "" {
		return nil, &RegisterError{Message: withoutKey(&r, out.Error), Terminal: r.Followup == ""}
	}
	return &out, nil
}

// withoutKey keeps the auth key out of the server's words, which go into errors and logs: some servers
// quote the key that they refuse.
func withoutKey(r *tailcfg.RegisterRequest, text string) string {
	if r.Auth == nil || r.Auth.AuthKey == "" {
		return text
	}
	return strings.ReplaceAll(text, r.Auth.AuthKey, "(the auth key)")
}

// longPast is the expiry by which a node asks control to forget its key.
var longPast = time.Unix(123, 0).UTC()

// Logout expires the node key at the server at once; an ephemeral node is removed. It blocks
// until the server answered or ctx ends.
func (c *Client) Logout(ctx context.Context, node key.NodePublic, hi *tailcfg.Hostinfo) error {
	_, err := c.Register(ctx, &tailcfg.RegisterRequest{NodeKey: node, Hostinfo: hi, Expiry: longPast})
	return err
}
