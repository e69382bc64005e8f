package portmap

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"sort"
	"strconv"
	"strings"
	"time"
)

const (
	// exchangeTimeout bounds one request to a router on the local network.
	exchangeTimeout = 2 * time.Second
	// maxBody bounds a router's answer. Descriptions of the most talkative ones have some 60 KB.
	maxBody = 128 << 10
	// description is what a router's user reads in its list of mappings.
	description = "tailnode"
)

// UPnP error codes (WANIPConnection:2 §2.5.16, .18 and .20).
const (
	upnpInvalidArgs   = 402
	upnpConflict      = 718 // another client has the port
	upnpSamePorts     = 724 // the external port must be the internal one
	upnpOnlyPermanent = 725
)

// upnpError is a router's refusal.
type upnpError int

func (e upnpError) Error() string { return "UPnP error " + strconv.Itoa(int(e)) }
func (e upnpError) Unwrap() error { return ErrRefused }

// exchange sends one HTTP request to at and returns the answer's body. There are no redirects, cookies, proxies or kept connections.
func (c *Client) exchange(ctx context.Context, at netip.AddrPort, req []byte) (status int, body []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	conn, err := c.cfg.DialContext(ctx, "tcp4", at.String())
	if err != nil {
		return 0, nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if _, err := conn.Write(req); err != nil {
		return 0, nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, maxBody)), nil)
	if err != nil {
		return 0, nil, err
	}
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) { // some do not count well
		return 0, nil, err
	}
	return resp.StatusCode, body, nil
}

// describe fetches the description at u from the router and returns its services, those first that say that they are connected.
func (c *Client) describe(ctx context.Context, gw netip.Addr, u location) ([]service, error) {
	at := netip.AddrPortFrom(gw, u.port)
	status, body, err := c.exchange(ctx, at, fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %v\r\nConnection: close\r\n\r\n", u.path, at))
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("%w: HTTP status %d", ErrNoService, status)
	}
	services := parseDescription(body, at, u.path)
	if len(services) == 0 {
		return nil, fmt.Errorf("%w: no UPnP service that maps ports", ErrNoService)
	}
	if len(services) > 1 { // one per uplink, most often
		up := make(map[service]bool, len(services))
		for _, s := range services {
			reply, err := c.call(ctx, s, "GetStatusInfo")
			status, _ := element(reply, "NewConnectionStatus")
			up[s] = err == nil && (status == "Connected" || status == "Up")
		}
		sort.SliceStable(services, func(i, j int) bool { return up[services[i]] && !up[services[j]] })
	}
	return services, nil
}

// call performs a SOAP action (UPnP Device Architecture §3.1.1) with pairs of argument names and values.
func (c *Client) call(ctx context.Context, s service, action string, args ...string) ([]byte, error) {
	var b strings.Builder
	b.WriteString(`<?xml version="1.0"?>` + "\r\n" +
		`<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" s:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body><u:`)
	b.WriteString(action + ` xmlns:u="` + s.typ + `">`)
	for i := 0; i+1 < len(args); i += 2 {
		b.WriteString("<" + args[i] + ">" + args[i+1] + "</" + args[i] + ">")
	}
	b.WriteString("</u:" + action + "></s:Body></s:Envelope>\r\n")
	req := fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: %v\r\nConnection: close\r\nContent-Type: text/xml; charset=\"utf-8\"\r\n"+
		"SOAPAction: \"%s#%s\"\r\nContent-Length: %d\r\n\r\n%s", s.control, s.at, s.typ, action, b.Len(), b.String())
	status, body, err := c.exchange(ctx, s.at, req)
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		if code, ok := element(body, "errorCode"); ok {
			if n, err := strconv.Atoi(code); err == nil {
				return nil, fmt.Errorf("portmap: %s: %w", action, upnpError(n))
			}
		}
		return nil, fmt.Errorf("portmap: %s: %w: HTTP status %d", action, ErrRefused, status)
	}
	if !bytes.Contains(body, []byte(action+"Response")) {
		return nil, fmt.Errorf("portmap: %s: %w", action, errMalformed)
	}
	return body, nil
}

// externalIP asks for the router's own address.
func (c *Client) externalIP(ctx context.Context, s service) (netip.Addr, error) {
	reply, err := c.call(ctx, s, "GetExternalIPAddress")
	if err != nil {
		return netip.Addr{}, err
	}
	text, _ := element(reply, "NewExternalIPAddress")
	a, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("portmap: external address: %w", errMalformed)
	}
	return a, nil
}

// mapUPnP makes or renews a mapping with one of the services. prev is the external port to keep, 0 for any.
func (c *Client) mapUPnP(ctx context.Context, services []service, want target, prev uint16) (*mapping, error) {
	err := ErrNoService
	for _, s := range services {
		var m *mapping
		if m, err = c.mapService(ctx, s, want, prev); err == nil || ctx.Err() != nil {
			return m, err
		}
		c.log.Debug("portmap: UPnP service", "type", s.typ, "err", err)
	}
	return nil, err
}

func (c *Client) mapService(ctx context.Context, s service, want target, prev uint16) (*mapping, error) {
	ip, err := c.externalIP(ctx, s) // first: a mapping that nobody can use is not made
	if err != nil {
		return nil, err
	}
	if !c.usable(ip) {
		return nil, fmt.Errorf("%w: external address %v", ErrUseless, ip)
	}
	port, lease := prev, uint32(lifetime/time.Second)
	var got uint16
	for range 4 {
		if port < 1024 {
			// Never 0: that is the wildcard, which opens every port (WANIPConnection:2 §2.3.18). Random, because
			// some routers take a port from the client that has it.
			port = uint16(1024 + rand.IntN(1<<16-1024))
		}
		got, err = c.addUPnP(ctx, s, want, port, lease)
		code, ok := errors.AsType[upnpError](err)
		if !ok {
			break // done, or there was no answer
		}
		switch {
		case (code == upnpOnlyPermanent || code == upnpInvalidArgs) && lease != 0:
			lease = 0
			continue
		case code == upnpSamePorts && port != want.port && want.port >= 1024:
			port = want.port
			continue
		case code == upnpConflict:
			port = 0
			continue
		}
		break
	}
	if err != nil {
		return nil, err
	}
	now := time.Now()
	m := &mapping{
		proto: UPnP, target: want, external: netip.AddrPortFrom(ip, got), service: s,
		// A permanent one is renewed as well: routers forget them when they restart.
		got: now, expires: now.Add(lifetime),
	}
	if got == 0 {
		return nil, fmt.Errorf("%w: external port 0", ErrUseless)
	}
	return m, nil
}

func (c *Client) addUPnP(ctx context.Context, s service, want target, port uint16, lease uint32) (uint16, error) {
	args := []string{
		"NewRemoteHost", "",
		"NewExternalPort", strconv.Itoa(int(port)),
		"NewProtocol", "UDP", // in capitals, or some refuse it
		"NewInternalPort", strconv.Itoa(int(want.port)),
		"NewInternalClient", want.self.String(),
		"NewEnabled", "1",
		"NewPortMappingDescription", description,
		"NewLeaseDuration", strconv.FormatUint(uint64(lease), 10),
	}
	if s.typ != serviceTypes[anyPortService] {
		_, err := c.call(ctx, s, "AddPortMapping", args...)
		return port, err
	}
	reply, err := c.call(ctx, s, "AddAnyPortMapping", args...)
	if err != nil {
		return 0, err
	}
	text, _ := element(reply, "NewReservedPort")
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("portmap: reserved port: %w", errMalformed)
	}
	return uint16(n), nil
}

func (c *Client) deleteUPnP(ctx context.Context, m *mapping) {
	c.call(ctx, m.service, "DeletePortMapping",
		"NewRemoteHost", "", "NewExternalPort", strconv.Itoa(int(m.external.Port())), "NewProtocol", "UDP")
}
