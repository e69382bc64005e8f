package tailnode

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"syscall"

	"github.com/tailnode/tailnode/internal/control"
	"github.com/tailnode/tailnode/internal/errcode"
	"github.com/tailnode/tailnode/internal/state"
)

// Code classifies an [Error]. The numbers are stable: they are the C library's error
// codes and the Rust crate's ErrorKind as well.
type Code = errcode.Code

// The codes. testdata/vectors/codes.json lists them for every face of the library, and a
// test holds the lists together.
const (
	CodeInternal           = errcode.Internal           // a fault in tailnode itself
	CodeInvalidArgument    = errcode.InvalidArgument    // an argument or a field cannot be used; the text says which and why
	CodeInvalidState       = errcode.InvalidState       // the call does not fit the state, such as changing what Start has read
	CodeClosed             = errcode.Closed             // the server, listener or connection is closed
	CodeCanceled           = errcode.Canceled           // the caller's context was cancelled; the text says what was missing
	CodeTimeout            = errcode.Timeout            // a deadline passed; the text says what was missing, such as a login, an approval or control
	CodeAuthRefused        = errcode.AuthRefused        // control refused the auth key or the node; the text is control's own
	CodeNeedsLogin         = errcode.NeedsLogin         // reserved (somebody must visit Status.AuthURL); see CodeTimeout
	CodeNeedsApproval      = errcode.NeedsApproval      // reserved (an administrator must approve the machine); see CodeTimeout
	CodeKeyExpired         = errcode.KeyExpired         // this node's key, or the peer's, has expired
	CodeControlUnreachable = errcode.ControlUnreachable // reserved (no connection to the control server); see CodeTimeout
	CodeControlProtocol    = errcode.ControlProtocol    // reserved (what answered does not speak the control protocol correctly); see CodeTimeout
	CodeStateCorrupt       = errcode.StateCorrupt       // the state is torn or is another program's; it was left as it is
	CodeStateLocked        = errcode.StateLocked        // another process uses the state directory
	CodeStateIO            = errcode.StateIO            // the state could not be read or written
	CodeNotTailnet         = errcode.NotTailnet         // the address or name is not on the tailnet
	CodeNoSuchHost         = errcode.NoSuchHost         // no node of the tailnet has this name
	CodeUnreachable        = errcode.Unreachable        // no node of the tailnet has this address, or no way leads to it
	CodeRefused            = errcode.Refused            // the peer refused the connection
	CodeReset              = errcode.Reset              // the peer reset the connection
	CodeAddressInUse       = errcode.AddressInUse       // something listens on that port already
	CodeNotFound           = errcode.NotFound           // no peer has the address that WhoIs was asked for
	CodeUnsupported        = errcode.Unsupported        // the network or the option is not offered
	CodeExhausted          = errcode.Exhausted          // a limit of this node was reached

	// In C and Rust only.
	CodePending  = errcode.Pending  // there is nothing to take yet
	CodeForked   = errcode.Forked   // this process is a fork of the one that has the node
	CodeCoreLost = errcode.CoreLost // the helper process that ran the node has ended
)

// Error is the error of every call of this package. Err holds the cause: errors.Is finds
// [net.ErrClosed], [context.Canceled], [context.DeadlineExceeded], [syscall.ECONNREFUSED] and
// their like in it.
type Error struct {
	Op   string // the call, such as "up" or "dial"
	Code Code
	Err  error
}

// Error returns "tailnode: op: cause".
func (e *Error) Error() string { return "tailnode: " + e.Op + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Timeout reports whether a deadline caused the error; with Temporary it makes *Error a [net.Error].
func (e *Error) Timeout() bool { return e.Code == CodeTimeout }

// Temporary reports whether the same call may succeed later.
func (e *Error) Temporary() bool { return e.Code == CodeTimeout || e.Code == CodeControlUnreachable }

// ErrStateNotExist is what a [Store] returns for an id that it holds nothing under. It is
// also [fs.ErrNotExist].
var ErrStateNotExist = state.ErrNotExist

// ErrPeerNotFound is what WhoIs gives for an address that no node of the tailnet has.
var ErrPeerNotFound = errors.New("no node of the tailnet has this address")

// opError wraps err as *Error, finding the code from the cause. nil stays nil.
func opError(op string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Op: op, Code: codeOf(err), Err: err}
}

func codeOf(err error) Code {
	if code := errcode.Of(err); code != 0 {
		return code
	}
	if reg, ok := errors.AsType[*control.RegisterError](err); ok && reg.Terminal {
		return CodeAuthRefused
	}
	for _, m := range [...]struct {
		target error
		code   Code
	}{
		{context.Canceled, CodeCanceled},
		{context.DeadlineExceeded, CodeTimeout},
		{os.ErrDeadlineExceeded, CodeTimeout},
		{net.ErrClosed, CodeClosed},
		{fs.ErrPermission, CodeStateIO},
		{state.ErrLocked, CodeStateLocked},
		{state.ErrCorrupt, CodeStateCorrupt},
		{state.ErrVersion, CodeStateCorrupt},
		{ErrPeerNotFound, CodeNotFound},
		{syscall.ECONNREFUSED, CodeRefused},
		{syscall.ECONNRESET, CodeReset},
		{syscall.EADDRINUSE, CodeAddressInUse},
		{syscall.EHOSTUNREACH, CodeUnreachable},
		{syscall.ENETUNREACH, CodeUnreachable},
		{syscall.ETIMEDOUT, CodeTimeout},
		{syscall.EINVAL, CodeInvalidArgument},
	} {
		if errors.Is(err, m.target) {
			return m.code
		}
	}
	return CodeInternal
}
