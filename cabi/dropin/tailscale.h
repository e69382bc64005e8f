/*
 * tailscale.h - the functions of libtailscale, carried out by tailnode. A program or a binding that was written for libtailscale
 * links or loads this library instead, without a change. New programs do better with tailnode.h, which has
 * time-outs, cancellation, addresses with ports, error codes and identities.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * RESULTS.  0, or -1 with a text that tailscale_errmsg gives, or EBADF (positive) for a handle that is not valid, or ERANGE (positive)
 * for a buffer that is too small. A buffer that is NULL gives -1, or ERANGE where its size is 0. No call crashes for a bad handle.
 *
 * THREADS.  Any function from any thread. tailscale_errmsg gives what went wrong last in the calling thread with that server; in a thread in which nothing
 * has, what went wrong last in any.
 *
 * DESCRIPTORS.  Listeners and connections are file descriptors, close-on-exec and blocking, and the host's to close with close(2). They occupy no thread.
 * Half-close works both ways; a reset reads as ECONNRESET.
 *
 * FORK.  In a child that has not called exec everything gives -1.
 *
 * $TAILNODE_MODE set to "isolated" runs the nodes in a helper process, as TAILNODE_ISOLATED does.
 */
#ifndef TAILSCALE_H
#define TAILSCALE_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef int tailscale;          /* a server: a node of a tailnet */
typedef int tailscale_conn;     /* a connection; for "udp" each read and write is one datagram */
typedef int tailscale_listener; /* polls readable when tailscale_accept has a connection */

/* A new server, a positive number, or -1. Nothing is connected before tailscale_start, _up, _listen, _dial or _loopback. Its numbers are not used again. */
extern tailscale tailscale_new(void);

/* Connects in the background. Optional. */
extern int tailscale_start(tailscale sd);

/* Starts if need be and waits until the node is on the tailnet. Fails as soon as control refuses it; tailscale_close ends it. */
extern int tailscale_up(tailscale sd);

/* Ends the server, its listeners and connections and what waits for them. The handle is not valid any more. */
extern int tailscale_close(tailscale sd);

/* What the server is to be. After it has started they give -1. NULL and "" mean the default. The strings are copied. */
extern int tailscale_set_dir(tailscale sd, const char *dir);
extern int tailscale_set_hostname(tailscale sd, const char *hostname);
extern int tailscale_set_authkey(tailscale sd, const char *authkey);
extern int tailscale_set_control_url(tailscale sd, const char *control_url);
extern int tailscale_set_ephemeral(tailscale sd, int ephemeral);

/* Where log lines go; -1: nowhere. Without it only the URL of an interactive login is written, to standard error. The library keeps a
 * duplicate of fd, and writes on a thread of its own. */
extern int tailscale_set_logfd(tailscale sd, int fd);

/* The node's addresses as text, IPv4 and IPv6 with a comma between; "" before it has any. */
extern int tailscale_getips(tailscale sd, char *buf, size_t buflen);

/* Connects to host:port on the tailnet, network "tcp" or "udp" (also with 4 or 6 behind). Starts the server if need be. */
extern int tailscale_dial(tailscale sd, const char *network, const char *addr, tailscale_conn *conn_out);

/* Listens on an address such as ":80", network "tcp". Starts the server if need be. */
extern int tailscale_listen(tailscale sd, const char *network, const char *addr, tailscale_listener *listener_out);

/* Takes the next connection, and waits for it unless the listener was set not to block (-1 with errno EAGAIN). */
extern int tailscale_accept(tailscale_listener listener, tailscale_conn *conn_out);

/* The IP address of the peer of a connection that tailscale_accept gave, without port. */
extern int tailscale_getremoteaddr(tailscale_listener listener, tailscale_conn conn, char *buf, size_t buflen);

/* Serves SOCKS5 into the tailnet (user "tsnet", password proxy_cred) and the LocalAPI's status, whois and ping (below /localapi/, header
 * "Sec-Tailscale: localapi", password local_api_cred) on "127.0.0.1:PORT". Both credentials are 32 characters and NUL. */
extern int tailscale_loopback(tailscale sd, char *addr_out, size_t addrlen, char *proxy_cred_out, char *local_api_cred_out);

/* Funnel is not offered: -1, and errmsg says so. */
extern int tailscale_enable_funnel_to_localhost_plaintext_http1(tailscale sd, int localhost_port);

/* What went wrong last; "" if nothing has. It always ends with NUL; with ERANGE it is cut. */
extern int tailscale_errmsg(tailscale sd, char *buf, size_t buflen);

/* The names that libtailscale's own bindings call for the same. */
extern int TsnetNewServer(void);
extern int TsnetStart(int sd);
extern int TsnetUp(int sd);
extern int TsnetClose(int sd);
extern int TsnetErrmsg(int sd, char *buf, size_t buflen);
extern int TsnetDial(int sd, char *network, char *addr, int *conn_out);
extern int TsnetSetDir(int sd, char *str);
extern int TsnetSetHostname(int sd, char *str);
extern int TsnetSetAuthKey(int sd, char *str);
extern int TsnetSetControlURL(int sd, char *str);
extern int TsnetSetEphemeral(int sd, int e);
extern int TsnetSetLogFD(int sd, int fd);
extern int TsnetGetIps(int sd, char *buf, size_t buflen);
extern int TsnetGetRemoteAddr(int listener, int conn, char *buf, size_t buflen);
extern int TsnetListen(int sd, char *network, char *addr, int *listener_out);
extern int TsnetAccept(int listener, int *conn_out);
extern int TsnetLoopback(int sd, char *addr_out, size_t addrlen, char *proxy_out, char *local_out);
extern int TsnetEnableFunnelToLocalhostPlaintextHttp1(int sd, int localhost_port);

#ifdef __cplusplus
}
#endif
#endif
