package portmap

import (
	"bytes"
	"net/netip"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// Routers answer in XML of every quality. All that is wanted of it is the text of a few elements, so this
// is a scanner and no parser: it knows tags, text, comments, CDATA and the five entities, takes names without
// their prefix, and does not care whether tags match.

const (
	maxServices = 16
	maxText     = 1024 // of one element
)

// scanner goes through a document.
type scanner struct{ b []byte }

// next returns the next tag and the text before it. An end tag's name begins with a slash; ok is false at the end
// of the document, and where it is broken.
func (s *scanner) next() (text []byte, tag string, ok bool) {
	for {
		i := bytes.IndexByte(s.b, '<')
		if i < 0 {
			return nil, "", false
		}
		if len(text)+i <= maxText {
			text = append(text, s.b[:i]...)
		}
		s.b = s.b[i:]
		switch {
		case bytes.HasPrefix(s.b, []byte("<!--")):
			if !s.skip("-->") {
				return nil, "", false
			}
		case bytes.HasPrefix(s.b, []byte("<![CDATA[")):
			from := s.b[len("<![CDATA["):]
			i := bytes.Index(from, []byte("]]>"))
			if i < 0 {
				return nil, "", false
			}
			if len(text)+i <= maxText {
				text = append(text, from[:i]...)
			}
			s.b = from[i+3:]
		case bytes.HasPrefix(s.b, []byte("<?")), bytes.HasPrefix(s.b, []byte("<!")):
			if !s.skip(">") {
				return nil, "", false
			}
		default:
			end := tagEnd(s.b)
			if end < 0 {
				return nil, "", false
			}
			tag, s.b = tagName(s.b[1:end]), s.b[end+1:]
			return text, tag, true
		}
	}
}

func (s *scanner) skip(mark string) bool {
	i := bytes.Index(s.b, []byte(mark))
	if i < 0 {
		return false
	}
	s.b = s.b[i+len(mark):]
	return true
}

// tagEnd returns where the tag that b begins with ends, minding quoted attributes.
func tagEnd(b []byte) int {
	var quote byte
	for i, c := range b {
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '"' || c == '\'':
			quote = c
		case c == '>':
			return i
		}
	}
	return -1
}

// tagName returns the local name of a tag, with the slash of an end tag. A tag without content, <a/>, counts as a start.
func tagName(b []byte) string {
	slash := ""
	if len(b) > 0 && b[0] == '/' {
		slash, b = "/", b[1:]
	}
	if i := bytes.IndexAny(b, " \t\r\n/"); i >= 0 {
		b = b[:i]
	}
	if i := bytes.LastIndexByte(b, ':'); i >= 0 {
		b = b[i+1:]
	}
	return slash + string(b[:min(len(b), 64)])
}

var entities = strings.NewReplacer("&lt;", "<", "&gt;", ">", "&quot;", `"`, "&apos;", "'", "&amp;", "&")

func clean(text []byte) string { return entities.Replace(string(bytes.TrimSpace(text))) }

// element returns the text of the first element called name.
func element(doc []byte, name string) (string, bool) {
	s, last := scanner{doc}, ""
	for {
		text, tag, ok := s.next()
		if !ok {
			return "", false
		}
		if last == name && tag == "/"+name {
			return clean(text), true
		}
		last = tag
	}
}

// service is something in a router that maps ports.
type service struct {
	typ     string // its URN
	control string // path and query of its control URL
	at      netip.AddrPort
}

// serviceTypes are the services that map ports, best first: the first can choose the port itself (WANIPConnection:2 §2.5.20);
// the last two are the names before UPnP.
var serviceTypes = []string{
	"urn:schemas-upnp-org:service:WANIPConnection:2",
	"urn:schemas-upnp-org:service:WANIPConnection:1",
	"urn:schemas-upnp-org:service:WANPPPConnection:1",
	"urn:dslforum-org:service:WANIPConnection:1",
	"urn:dslforum-org:service:WANPPPConnection:1",
}

const anyPortService = 0 // in serviceTypes

// parseDescription returns the port mapping services of a device description (UPnP Device Architecture §2.3) that was had
// from path at at, best first. Wherever the description says that they are, they are taken to be at the same
// address: a router that is asked must not be able to send a node anywhere else.
func parseDescription(doc []byte, at netip.AddrPort, path string) (out []service) {
	s, in := scanner{doc}, false
	var cur service
	for {
		text, tag, ok := s.next()
		if !ok {
			break
		}
		switch tag {
		case "/URLBase": // before the devices, if at all; its port is the services' (UPnP 1.0)
			if u, ok := parseURL(clean(text)); ok && u.port != 0 {
				at, path = netip.AddrPortFrom(at.Addr(), u.port), u.path
			}
		case "service":
			in, cur = true, service{}
		case "/serviceType":
			cur.typ = clean(text)
		case "/controlURL":
			cur.control = clean(text)
		case "/service":
			if in && len(out) < maxServices && slices.Contains(serviceTypes, cur.typ) && resolve(&cur, at, path) {
				out = append(out, cur)
			}
			in = false
		}
	}
	sort.SliceStable(out, func(i, j int) bool {
		return slices.Index(serviceTypes, out[i].typ) < slices.Index(serviceTypes, out[j].typ)
	})
	return out
}

// resolve makes the service's control URL, which may be relative to base, absolute.
func resolve(s *service, at netip.AddrPort, base string) bool {
	if s.at = at; s.control == "" {
		return false
	}
	if u, ok := parseURL(s.control); ok {
		s.control = u.path
		if u.port != 0 {
			s.at = netip.AddrPortFrom(at.Addr(), u.port)
		}
	} else if strings.Contains(s.control, "://") {
		return false
	} else if !strings.HasPrefix(s.control, "/") {
		base, _, _ = strings.Cut(base, "?")
		s.control = base[:strings.LastIndexByte(base, '/')+1] + s.control
	}
	return validPath(s.control)
}

// location is what is used of a URL.
type location struct {
	host string
	port uint16
	path string
}

// parseURL splits an http URL.
func parseURL(raw string) (u location, ok bool) {
	const scheme = "http://"
	if len(raw) < len(scheme) || len(raw) > maxText || !strings.EqualFold(raw[:len(scheme)], scheme) {
		return u, false
	}
	host := raw[len(scheme):]
	if i := strings.IndexAny(host, "/?"); i >= 0 {
		host, u.path = host[:i], host[i:]
	}
	if !strings.HasPrefix(u.path, "/") {
		u.path = "/" + u.path
	}
	u.host, u.port = host, 80
	if h, p, found := strings.Cut(host, ":"); found { // IPv4 or a name: no colons
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return u, false
		}
		u.host, u.port = h, uint16(n)
	}
	return u, u.host != "" && validPath(u.path)
}

// validPath reports whether p can stand in a request line.
func validPath(p string) bool {
	if len(p) == 0 || len(p) > maxText || p[0] != '/' {
		return false
	}
	for _, c := range []byte(p) {
		if c <= ' ' || c >= 0x7f {
			return false
		}
	}
	return true
}

// parseSSDP returns where the description of the gateway that answered a search is (UPnP Device Architecture
// §1.3.3). Answers of other devices, of which a network has many, are not ok.
func parseSSDP(b []byte) (u location, ok bool) {
	line, rest, found := bytes.Cut(b, []byte("\n"))
	if !found || !bytes.HasPrefix(line, []byte("HTTP/1.")) || !bytes.Contains(line, []byte(" 200")) {
		return u, false
	}
	igd, where := false, ""
	for range 64 {
		if line, rest, found = bytes.Cut(rest, []byte("\n")); len(line) == 0 && !found {
			break
		}
		k, v, _ := bytes.Cut(line, []byte(":"))
		v = bytes.TrimSpace(v)
		switch name := string(bytes.TrimSpace(k)); {
		case strings.EqualFold(name, "Location"):
			where = string(v)
		case strings.EqualFold(name, "ST"), strings.EqualFold(name, "USN"):
			igd = igd || bytes.Contains(v, []byte(":InternetGatewayDevice:"))
		}
	}
	if u, ok = parseURL(where); !ok || !igd {
		return location{}, false
	}
	return u, true
}
