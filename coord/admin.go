package coord

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/tailnode/tailnode/coord/internal/alloc"
)

// The admin API is one POST per method of Server, with a JSON object of arguments, a bearer token,
// and a JSON answer. It listens on an address of its own, on loopback unless told otherwise.

const maxAdminBody = 1 << 20

// adminInfo is the file by which another process of the same user finds the API.
type adminInfo struct{ URL, Token string }

// adminArgs holds the arguments of every method.
type adminArgs struct {
	ID      string          `json:",omitempty"`
	Name    string          `json:",omitempty"`
	Display string          `json:",omitempty"`
	Tags    []string        `json:",omitempty"`
	Key     *AuthKeyOptions `json:",omitempty"`
	Approve *ApproveOptions `json:",omitempty"`
	Filter  *Filter         `json:",omitempty"`
	Relays  []Region        `json:",omitempty"`
}

type adminMethod func(*Server, *adminArgs) (any, error)

// act makes a method that answers nothing.
func act(f func(*Server, *adminArgs) error) adminMethod {
	return func(s *Server, a *adminArgs) (any, error) { return struct{}{}, f(s, a) }
}

var adminMethods = map[string]adminMethod{
	"info": func(s *Server, a *adminArgs) (any, error) { return Info{URL: s.BaseURL(), Domain: s.domain}, nil },
	"create-auth-key": func(s *Server, a *adminArgs) (any, error) {
		if a.Key == nil {
			a.Key = &AuthKeyOptions{}
		}
		return s.CreateAuthKey(*a.Key)
	},
	"list-auth-keys":  func(s *Server, a *adminArgs) (any, error) { return s.ListAuthKeys() },
	"revoke-auth-key": act(func(s *Server, a *adminArgs) error { return s.RevokeAuthKey(a.ID) }),
	"create-user":     act(func(s *Server, a *adminArgs) error { return s.CreateUser(a.Name, a.Display) }),
	"list-users":      func(s *Server, a *adminArgs) (any, error) { return s.ListUsers() },
	"nodes":           func(s *Server, a *adminArgs) (any, error) { return s.Nodes() },
	"node":            func(s *Server, a *adminArgs) (any, error) { return s.Node(a.ID) },
	"delete-node":     act(func(s *Server, a *adminArgs) error { return s.DeleteNode(a.ID) }),
	"expire-node":     act(func(s *Server, a *adminArgs) error { return s.ExpireNode(a.ID) }),
	"approve-node":    act(func(s *Server, a *adminArgs) error { return s.ApproveNode(a.ID) }),
	"rename-node":     act(func(s *Server, a *adminArgs) error { return s.RenameNode(a.ID, a.Name) }),
	"set-tags":        act(func(s *Server, a *adminArgs) error { return s.SetTags(a.ID, a.Tags) }),
	"pending-logins":  func(s *Server, a *adminArgs) (any, error) { return s.PendingLogins() },
	"approve-login": act(func(s *Server, a *adminArgs) error {
		if a.Approve == nil {
			a.Approve = &ApproveOptions{}
		}
		return s.ApproveLogin(a.ID, *a.Approve)
	}),
	"reject-login": act(func(s *Server, a *adminArgs) error { return s.RejectLogin(a.ID) }),
	"set-filter":   act(func(s *Server, a *adminArgs) error { return s.SetFilter(a.Filter) }),
	"set-relays":   act(func(s *Server, a *adminArgs) error { return s.SetRelays(a.Relays) }),
}

// adminErrors are the errors that keep their identity across the API, by HTTP status.
var adminErrors = map[int]error{
	http.StatusNotFound: ErrNotFound, http.StatusConflict: ErrExists, http.StatusBadRequest: ErrInvalid,
	http.StatusForbidden: ErrNotAllowed, http.StatusServiceUnavailable: ErrClosed,
}

// adminHandler makes the handler and writes the file that leads to it.
func (s *Server) adminHandler(a net.Addr) (http.Handler, error) {
	info := adminInfo{URL: listenURL(a, false), Token: alloc.ID(25)}
	b, err := json.Marshal(info)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(s.Dir, adminFile)
	tmp := path + ".new"
	os.Remove(tmp) // left by a process that was killed
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, path); err != nil {
		return nil, err
	}
	want := sha256.Sum256([]byte("Bearer " + info.Token))
	return s.counted(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got := sha256.Sum256([]byte(r.Header.Get("Authorization")))
		if subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
			http.Error(w, "wrong token", http.StatusUnauthorized)
			return
		}
		name, ok := strings.CutPrefix(r.URL.Path, "/v1/")
		m := adminMethods[name]
		if !ok || m == nil || r.Method != http.MethodPost {
			http.Error(w, "no such method", http.StatusNotImplemented)
			return
		}
		var args adminArgs
		if !readJSON(w, r, maxAdminBody, &args) {
			return
		}
		out, err := m(s, &args)
		if err != nil {
			status := http.StatusInternalServerError
			for code, e := range adminErrors {
				if errors.Is(err, e) {
					status = code
				}
			}
			http.Error(w, strings.TrimPrefix(err.Error(), "coord: "), status)
			return
		}
		writeJSON(w, out)
	})), nil
}

// Info says which server an [Admin] administers.
type Info struct{ URL, Domain string }

// Admin administers a [Server] of another process. Its methods are those of Server, each with a
// context that bounds it; errors.Is finds the same errors. It is safe for concurrent use.
type Admin struct {
	URL    string       // of the admin API
	Token  string       // a secret
	Client *http.Client // nil = http.DefaultClient
}

// OpenAdmin returns the administrator of the server that runs on dir (see [Server.Dir]). The
// error wraps os.ErrNotExist if none does.
func OpenAdmin(dir string) (*Admin, error) {
	b, err := os.ReadFile(filepath.Join(dir, adminFile))
	if err != nil {
		return nil, fmt.Errorf("coord: no server runs on %s: %w", dir, err)
	}
	var info adminInfo
	if err := json.Unmarshal(b, &info); err != nil {
		return nil, fmt.Errorf("coord: %s: %w", adminFile, err)
	}
	return &Admin{URL: info.URL, Token: info.Token}, nil
}

func (a *Admin) call(ctx context.Context, method string, args adminArgs, out any) error {
	b, err := json.Marshal(args)
	if err != nil {
		return fmt.Errorf("coord: %s: %w", method, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.URL+"/v1/"+method, bytes.NewReader(b))
	if err != nil {
		return fmt.Errorf("coord: %s: %w", method, err)
	}
	req.Header.Set("Authorization", "Bearer "+a.Token)
	c := a.Client
	if c == nil {
		c = http.DefaultClient
	}
	resp, err := c.Do(req)
	if err != nil {
		return fmt.Errorf("coord: %s: %w", method, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 256<<20))
	if err != nil {
		return fmt.Errorf("coord: %s: %w", method, err)
	}
	if resp.StatusCode != http.StatusOK {
		text := strings.TrimSpace(string(body[:min(len(body), 1000)]))
		if e := adminErrors[resp.StatusCode]; e != nil {
			return &adminError{text, e}
		}
		return fmt.Errorf("coord: %s: %s: %s", method, resp.Status, text)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("coord: %s: %w", method, err)
	}
	return nil
}

// adminError is an error of the server, in its words.
type adminError struct {
	text string
	is   error
}

func (e *adminError) Error() string { return "coord: " + e.text }
func (e *adminError) Unwrap() error { return e.is }

// Info returns the server's URL for nodes and its domain.
func (a *Admin) Info(ctx context.Context) (out Info, err error) {
	err = a.call(ctx, "info", adminArgs{}, &out)
	return out, err
}

// CreateAuthKey is [Server.CreateAuthKey].
func (a *Admin) CreateAuthKey(ctx context.Context, o AuthKeyOptions) (secret string, err error) {
	err = a.call(ctx, "create-auth-key", adminArgs{Key: &o}, &secret)
	return secret, err
}

// ListAuthKeys is [Server.ListAuthKeys].
func (a *Admin) ListAuthKeys(ctx context.Context) (out []AuthKey, err error) {
	err = a.call(ctx, "list-auth-keys", adminArgs{}, &out)
	return out, err
}

// RevokeAuthKey is [Server.RevokeAuthKey].
func (a *Admin) RevokeAuthKey(ctx context.Context, id string) error {
	return a.call(ctx, "revoke-auth-key", adminArgs{ID: id}, nil)
}

// CreateUser is [Server.CreateUser].
func (a *Admin) CreateUser(ctx context.Context, name, displayName string) error {
	return a.call(ctx, "create-user", adminArgs{Name: name, Display: displayName}, nil)
}

// ListUsers is [Server.ListUsers].
func (a *Admin) ListUsers(ctx context.Context) (out []User, err error) {
	err = a.call(ctx, "list-users", adminArgs{}, &out)
	return out, err
}

// Nodes is [Server.Nodes].
func (a *Admin) Nodes(ctx context.Context) (out []Node, err error) {
	err = a.call(ctx, "nodes", adminArgs{}, &out)
	return out, err
}

// Node is [Server.Node].
func (a *Admin) Node(ctx context.Context, node string) (out Node, err error) {
	err = a.call(ctx, "node", adminArgs{ID: node}, &out)
	return out, err
}

// DeleteNode is [Server.DeleteNode].
func (a *Admin) DeleteNode(ctx context.Context, node string) error {
	return a.call(ctx, "delete-node", adminArgs{ID: node}, nil)
}

// ExpireNode is [Server.ExpireNode].
func (a *Admin) ExpireNode(ctx context.Context, node string) error {
	return a.call(ctx, "expire-node", adminArgs{ID: node}, nil)
}

// ApproveNode is [Server.ApproveNode].
func (a *Admin) ApproveNode(ctx context.Context, node string) error {
	return a.call(ctx, "approve-node", adminArgs{ID: node}, nil)
}

// RenameNode is [Server.RenameNode].
func (a *Admin) RenameNode(ctx context.Context, node, name string) error {
	return a.call(ctx, "rename-node", adminArgs{ID: node, Name: name}, nil)
}

// SetTags is [Server.SetTags].
func (a *Admin) SetTags(ctx context.Context, node string, tags []string) error {
	return a.call(ctx, "set-tags", adminArgs{ID: node, Tags: tags}, nil)
}

// PendingLogins is [Server.PendingLogins].
func (a *Admin) PendingLogins(ctx context.Context) (out []Login, err error) {
	err = a.call(ctx, "pending-logins", adminArgs{}, &out)
	return out, err
}

// ApproveLogin is [Server.ApproveLogin].
func (a *Admin) ApproveLogin(ctx context.Context, id string, o ApproveOptions) error {
	return a.call(ctx, "approve-login", adminArgs{ID: id, Approve: &o}, nil)
}

// RejectLogin is [Server.RejectLogin].
func (a *Admin) RejectLogin(ctx context.Context, id string) error {
	return a.call(ctx, "reject-login", adminArgs{ID: id}, nil)
}

// SetFilter is [Server.SetFilter].
func (a *Admin) SetFilter(ctx context.Context, f *Filter) error {
	return a.call(ctx, "set-filter", adminArgs{Filter: f}, nil)
}

// SetRelays is [Server.SetRelays].
func (a *Admin) SetRelays(ctx context.Context, regions []Region) error {
	return a.call(ctx, "set-relays", adminArgs{Relays: regions}, nil)
}
