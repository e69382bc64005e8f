package netstack

import (
	"errors"
	"net"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// Errors of the network, for errors.Is. They are the system's own numbers, so that code written for sockets of the
// operating system finds what it looks for. They come wrapped in *net.OpError.
var (
	ErrRefused     error = syscall.ECONNREFUSED  // the peer answered with a reset
	ErrReset       error = syscall.ECONNRESET    // the peer reset the connection
	ErrTimeout     error = syscall.ETIMEDOUT     // the peer did not answer
	ErrUnreachable error = syscall.EHOSTUNREACH  // the peer cannot be reached
	ErrNoNetwork   error = syscall.ENETUNREACH   // the node has no address of that family
	ErrInUse       error = syscall.EADDRINUSE    // another listener or socket has the address
	ErrNotLocal    error = syscall.EADDRNOTAVAIL // the address is not the node's own
)

// sysError translates the stack's error. closed says that the caller's own side has closed the socket.
func sysError(err tcpip.Error, closed bool) error {
	if closed {
		return net.ErrClosed
	}
	switch err.(type) {
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrConnectionReset:
		return syscall.ECONNRESET
	case *tcpip.ErrConnectionAborted:
		return syscall.ECONNABORTED
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable, *tcpip.ErrNoNet:
		return syscall.ENETUNREACH
	case *tcpip.ErrPortInUse, *tcpip.ErrDuplicateAddress:
		return syscall.EADDRINUSE
	case *tcpip.ErrBadLocalAddress, *tcpip.ErrNoPortAvailable:
		return syscall.EADDRNOTAVAIL
	case *tcpip.ErrClosedForSend:
		return syscall.EPIPE
	case *tcpip.ErrMessageTooLong:
		return syscall.EMSGSIZE
	case *tcpip.ErrNoBufferSpace:
		return syscall.ENOBUFS
	case *tcpip.ErrNotConnected, *tcpip.ErrDestinationRequired:
		return syscall.ENOTCONN
	case *tcpip.ErrAborted:
		return net.ErrClosed
	}
	return errors.New("netstack: " + err.String())
}

// opError builds the error that the standard library's sockets return. Invalid addresses are left out.
func opError(op, network string, src, dst netip.AddrPort, err error) *net.OpError {
	e := &net.OpError{Op: op, Net: network, Err: err}
	if src.IsValid() {
		e.Source = netAddr(network, src)
	}
	if dst.IsValid() {
		e.Addr = netAddr(network, dst)
	}
	return e
}

func netAddr(network string, ap netip.AddrPort) net.Addr {
	if network == "udp" {
		return net.UDPAddrFromAddrPort(ap)
	}
	return net.TCPAddrFromAddrPort(ap)
}
