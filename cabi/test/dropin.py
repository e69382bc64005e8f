"""The drop-in as a language binding uses it: ctypes, the Tsnet names, sockets made of descriptors. dropin.py LIBRARY"""
import base64, ctypes, json, os, shutil, socket, sys, tempfile, threading, urllib.request

lib = ctypes.CDLL(sys.argv[1])
for name in ("Errmsg", "GetIps"):
    getattr(lib, "Tsnet" + name).argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
lib.TsnetGetRemoteAddr.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
lib.TsnetLoopback.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p]


def check(sd, code):
    if code:
        buf = ctypes.create_string_buffer(512)
        lib.TsnetErrmsg(sd, buf, len(buf))
        raise RuntimeError(f"{code}: {buf.value.decode()}")


def server(hostname, home):
    sd = lib.TsnetNewServer()
    assert sd > 0
    for f, v in ((lib.TsnetSetDir, os.path.join(home, hostname)), (lib.TsnetSetHostname, hostname),
                 (lib.TsnetSetAuthKey, os.environ["TS_AUTHKEY"]), (lib.TsnetSetControlURL, os.environ["TS_CONTROL_URL"])):
        check(sd, f(sd, v.encode()))
    check(sd, lib.TsnetSetEphemeral(sd, 1))
    check(sd, lib.TsnetSetLogFD(sd, -1))
    check(sd, lib.TsnetUp(sd))
    return sd


home = tempfile.mkdtemp()
a, b = server("pya", home), server("pyb", home)
buf = ctypes.create_string_buffer(200)
check(a, lib.TsnetGetIps(a, buf, len(buf)))
ips = buf.value.decode().split(",")
assert ips[0].startswith("100.") and len(ips) == 2, ips

ln, conn = ctypes.c_int(), ctypes.c_int()
check(b, lib.TsnetListen(b, b"tcp", b":8080", ctypes.byref(ln)))


def serve():
    c = ctypes.c_int()
    check(b, lib.TsnetAccept(ln, ctypes.byref(c)))
    who = ctypes.create_string_buffer(64)
    check(b, lib.TsnetGetRemoteAddr(ln, c, who, len(who)))
    with socket.socket(fileno=c.value) as s, s.makefile("rb") as f:
        assert f.readline() == b"GET / HTTP/1.0\r\n"
        s.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello " + who.value)


t = threading.Thread(target=serve)
t.start()
check(a, lib.TsnetDial(a, b"tcp4", b"pyb:8080", ctypes.byref(conn)))
with socket.socket(fileno=conn.value) as s:
    s.sendall(b"GET / HTTP/1.0\r\n\r\n")
    s.shutdown(socket.SHUT_WR)
    got = b""
    while chunk := s.recv(100):
        got += chunk
assert got.endswith(b"hello " + ips[0].encode()), got
t.join()
os.close(ln.value)

addr, proxy, local = ctypes.create_string_buffer(100), ctypes.create_string_buffer(33), ctypes.create_string_buffer(33)
check(a, lib.TsnetLoopback(a, addr, len(addr), proxy, local))
req = urllib.request.Request(f"http://{addr.value.decode()}/localapi/v0/status", headers={
    "Sec-Tailscale": "localapi", "Authorization": "Basic " + base64.b64encode(b":" + local.value).decode()})
with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(req) as r:
    st = json.load(r)
assert st["BackendState"] == "Running" and st["Self"]["TailscaleIPs"] == ips and st["Self"]["HostName"] == "pya", st["Self"]
assert any(p["HostName"] == "pyb" for p in st["Peer"].values())

check(a, lib.TsnetClose(a))
check(b, lib.TsnetClose(b))
assert lib.TsnetUp(a) == 9  # EBADF
shutil.rmtree(home)
print("dropin: ok")
