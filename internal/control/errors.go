package control

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"
)

var (
	// ErrClosed reports a call on a closed Client or Session.
	ErrClosed = errors.New("control: closed")
	// ErrNotControl is wrapped when what answered is no control server.
	ErrNotControl = errors.New("control: this is not a control server")
	// ErrWrongKey is wrapped when the Noise handshake fails although the server's key was just
	// fetched: the server that completes the handshake is not the one that gave the key.
	ErrWrongKey = errors.New("control: wrong control key")
	// ErrTooLarge is wrapped when an answer or a frame of the map stream exceeds its limit.
	ErrTooLarge = errors.New("control: answer too large")
	// ErrBadMap is wrapped when a frame of the map stream cannot be decoded.
	ErrBadMap = errors.New("control: malformed map response")
	// ErrSilent is wrapped when the map stream brought nothing, not even a keep-alive, for
	// the watchdog's time.
	ErrSilent = errors.New("control: the server fell silent")
	// ErrAborted is wrapped when AbortDial ended a dial.
	ErrAborted = errors.New("control: given up for another attempt, as the network changed")
	// ErrLoggedOut ends a Session that was logged out.
	ErrLoggedOut = errors.New("control: logged out")
)

// RegisterError is the server's refusal to register the node, in its own words.
type RegisterError struct {
	Message  string // as the server sent it
	Terminal bool   // trying again with the same credential is of no use
}

// Error implements error.
func (e *RegisterError) Error() string { return "control: registration refused: " + e.Message }

// HTTPError is an answer within the channel whose status is not 200.
type HTTPError struct {
	Path   string
	Status int
	Text   string // the beginning of the body
}

// Error implements error.
func (e *HTTPError) Error() string {
	if e.Text == "" {
		return fmt.Sprintf("control: %s: HTTP status %d", e.Path, e.Status)
	}
	return fmt.Sprintf("control: %s: HTTP status %d: %s", e.Path, e.Status, e.Text)
}

// RateLimitError asks the node to wait: HTTP status 429 or 503.
type RateLimitError struct {
	Path       string
	Status     int
	Text       string
	RetryAfter time.Duration // always positive
}

// Error implements error.
func (e *RateLimitError) Error() string {
	return fmt.Sprintf("control: %s: the server asks to wait %v: HTTP status %d: %s",
		e.Path, e.RetryAfter.Round(time.Second), e.Status, e.Text)
}

// retryAfter reads a Retry-After header, which holds seconds or a date (RFC 9110 §10.2.3). What
// is missing or senseless becomes a random time between 5 and 10 seconds.
func retryAfter(v string, now time.Time) time.Duration {
	var d time.Duration
	if n, err := strconv.Atoi(v); err == nil && n < 1<<20 {
		d = time.Duration(n) * time.Second
	} else if t, err := http.ParseTime(v); err == nil {
		d = t.Sub(now)
	}
	if d <= 0 || d > time.Hour {
		d = 5*time.Second + rand.N(5*time.Second)
	}
	return d
}
