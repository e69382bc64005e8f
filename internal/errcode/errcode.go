// Package errcode is the one list of error codes that the Go package, the C library and the
// Rust crate share, and the way in which internal packages attach a code to an error.
package errcode

import (
	"errors"
	"fmt"
)

// Code classifies an error. The numbers are stable.
type Code int

// The codes.
const (
	Internal           Code = 1  // a fault in tailnode itself
	InvalidArgument    Code = 2  // an argument or a field cannot be used; the text says which and why
	InvalidState       Code = 3  // the call does not fit the state, such as changing what Start has read
	Closed             Code = 4  // the server, listener or connection is closed
	Canceled           Code = 5  // the caller's context was cancelled; the text says what was missing
	Timeout            Code = 6  // a deadline passed; the text says what was missing, such as a login, an approval or control
	AuthRefused        Code = 7  // control refused the auth key or the node; the text is control's own
	NeedsLogin         Code = 8  // reserved (somebody must visit Status.AuthURL); see Timeout
	NeedsApproval      Code = 9  // reserved (an administrator must approve the machine); see Timeout
	KeyExpired         Code = 10 // this node's key, or the peer's, has expired
	ControlUnreachable Code = 11 // reserved (no connection to the control server); see Timeout
	ControlProtocol    Code = 12 // reserved (what answered does not speak the control protocol correctly); see Timeout
	StateCorrupt       Code = 13 // the state is torn or is another program's; it was left as it is
	StateLocked        Code = 14 // another process uses the state directory
	StateIO            Code = 15 // the state could not be read or written
	NotTailnet         Code = 16 // the address or name is not on the tailnet
	NoSuchHost         Code = 17 // no node of the tailnet has this name
	Unreachable        Code = 18 // no node of the tailnet has this address, or no way leads to it
	Refused            Code = 19 // the peer refused the connection
	Reset              Code = 20 // the peer reset the connection
	AddressInUse       Code = 21 // something listens on that port already
	NotFound           Code = 22 // no peer has the address that WhoIs was asked for
	Unsupported        Code = 23 // the network or the option is not offered
	Exhausted          Code = 24 // a limit of this node was reached
	Pending            Code = 25 // C and Rust: there is nothing to take yet
	Forked             Code = 26 // C and Rust: this process is a fork of the one that has the node
	CoreLost           Code = 27 // C and Rust: the helper process that ran the node has ended
)

var names = [...]string{
	Internal:           "internal",
	InvalidArgument:    "invalid argument",
	InvalidState:       "invalid state",
	Closed:             "closed",
	Canceled:           "canceled",
	Timeout:            "timeout",
	AuthRefused:        "auth refused",
	NeedsLogin:         "needs login",
	NeedsApproval:      "needs approval",
	KeyExpired:         "key expired",
	ControlUnreachable: "control unreachable",
	ControlProtocol:    "control protocol",
	StateCorrupt:       "state corrupt",
	StateLocked:        "state locked",
	StateIO:            "state i/o",
	NotTailnet:         "not on the tailnet",
	NoSuchHost:         "no such host",
	Unreachable:        "unreachable",
	Refused:            "refused",
	Reset:              "reset",
	AddressInUse:       "address in use",
	NotFound:           "not found",
	Unsupported:        "unsupported",
	Exhausted:          "exhausted",
	Pending:            "pending",
	Forked:             "forked",
	CoreLost:           "core lost",
}

// String returns the code in words.
func (c Code) String() string {
	if c > 0 && int(c) < len(names) {
		return names[c]
	}
	return fmt.Sprintf("code %d", int(c))
}

// Count is one more than the highest code.
const Count = CoreLost + 1

// Error is an error with its code.
type Error struct {
	Code Code
	Err  error
}

// Error returns the text of the cause.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// With attaches code to err. nil stays nil.
func With(code Code, err error) error {
	if err == nil {
		return nil
	}
	return &Error{code, err}
}

// New returns an error with a code and a formatted text; %w works as in fmt.Errorf.
func New(code Code, format string, args ...any) error {
	return &Error{code, fmt.Errorf(format, args...)}
}

// Of returns the code attached to err or to what it wraps, or 0.
func Of(err error) Code {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return 0
}
