//! What control and the node tell, as it comes in JSON. Unknown fields are ignored, missing ones are empty. Times are RFC 3339.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fmt;
use std::mem::offset_of;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use tailnode_sys as sys;

use crate::error::{Error, ErrorKind, Result};

/// Go writes an empty slice or map as null.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> std::result::Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

/// Capabilities with their arguments.
pub type CapMap = BTreeMap<String, Option<Vec<Value>>>;

macro_rules! record {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $t:ty = $json:literal,)* }) => {
        $(#[$doc])*
        #[non_exhaustive]
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        pub struct $name {
            $($(#[$fdoc])* #[serde(rename = $json, default, deserialize_with = "or_default")] pub $field: $t,)*
        }
    };
}

record! {
    /// The state of a node and of the tailnet as it sees it.
    Status {
        /// Of the library.
        version: String = "Version",
        /// `NoState`, `NeedsLogin`, `NeedsMachineAuth`, `Starting`, `Running` or `Stopped`.
        backend_state: String = "BackendState",
        /// To be visited by somebody to let the node in; empty otherwise.
        auth_url: String = "AuthURL",
        /// The node's addresses.
        tailscale_ips: Vec<IpAddr> = "TailscaleIPs",
        /// This node.
        this: Option<PeerStatus> = "Self",
        /// What is wrong right now; empty if nothing is.
        health: Vec<String> = "Health",
        /// Such as `example.ts.net`.
        magic_dns_suffix: String = "MagicDNSSuffix",
        /// `None` before the first netmap.
        current_tailnet: Option<TailnetStatus> = "CurrentTailnet",
        /// Names for which control would help to get certificates.
        cert_domains: Vec<String> = "CertDomains",
        /// The peers by their node keys.
        peer: BTreeMap<String, PeerStatus> = "Peer",
        /// The users by their ids.
        user: BTreeMap<String, UserProfile> = "User",
    }
}

record! {
    /// The tailnet's names.
    TailnetStatus {
        /// Its name.
        name: String = "Name",
        /// Such as `example.ts.net`.
        magic_dns_suffix: String = "MagicDNSSuffix",
        /// Whether names resolve.
        magic_dns_enabled: bool = "MagicDNSEnabled",
    }
}

record! {
    /// One node of the tailnet as this node sees it.
    PeerStatus {
        /// Its stable id.
        id: String = "ID",
        /// Its key.
        public_key: String = "PublicKey",
        /// What the host calls itself; not unique.
        host_name: String = "HostName",
        /// MagicDNS name with the trailing dot.
        dns_name: String = "DNSName",
        /// Operating system.
        os: String = "OS",
        /// Its owner.
        user_id: i64 = "UserID",
        /// Its addresses.
        tailscale_ips: Vec<IpAddr> = "TailscaleIPs",
        /// The prefixes that are routed to it.
        allowed_ips: Vec<String> = "AllowedIPs",
        /// Its tags.
        tags: Vec<String> = "Tags",
        /// The subnet routes that it serves.
        primary_routes: Vec<String> = "PrimaryRoutes",
        /// Endpoints that it may be reached at.
        addrs: Vec<String> = "Addrs",
        /// The endpoint in use; empty: by relay.
        cur_addr: String = "CurAddr",
        /// Code of its home relay region.
        relay: String = "Relay",
        /// Bytes of WireGuard messages from it.
        rx_bytes: i64 = "RxBytes",
        /// Bytes of WireGuard messages to it.
        tx_bytes: i64 = "TxBytes",
        /// When it joined.
        created: String = "Created",
        /// When control last saw it.
        last_seen: String = "LastSeen",
        /// When WireGuard last shook hands with it.
        last_handshake: String = "LastHandshake",
        /// Connected to control.
        online: bool = "Online",
        /// In use as exit node.
        exit_node: bool = "ExitNode",
        /// Offers to be an exit node.
        exit_node_option: bool = "ExitNodeOption",
        /// There is a WireGuard session with it.
        active: bool = "Active",
        /// Its capabilities.
        cap_map: CapMap = "CapMap",
        /// Its key has expired.
        expired: bool = "Expired",
        /// When its key expires; `None`: never.
        key_expiry: Option<String> = "KeyExpiry",
    }
}

record! {
    /// Who has an address.
    WhoIs {
        /// The node.
        node: NodeInfo = "Node",
        /// Its owner; for a tagged node, one that stands for its tags.
        user_profile: UserProfile = "UserProfile",
        /// What the tailnet's policy grants the peer at this node.
        cap_map: CapMap = "CapMap",
    }
}

record! {
    /// A node of the tailnet.
    NodeInfo {
        /// Its id within the control server.
        id: i64 = "ID",
        /// Its stable id.
        stable_id: String = "StableID",
        /// MagicDNS name with the trailing dot.
        name: String = "Name",
        /// MagicDNS name without the domain.
        computed_name: String = "ComputedName",
        /// Its owner.
        user: i64 = "User",
        /// Its key.
        key: String = "Key",
        /// When its key expires; `None`: never.
        key_expiry: Option<String> = "KeyExpiry",
        /// Its addresses, as prefixes.
        addresses: Vec<String> = "Addresses",
        /// The prefixes that are routed to it.
        allowed_ips: Vec<String> = "AllowedIPs",
        /// What it tells of its host.
        hostinfo: Hostinfo = "Hostinfo",
        /// When it joined.
        created: String = "Created",
        /// Its tags.
        tags: Vec<String> = "Tags",
        /// `None`: unknown.
        online: Option<bool> = "Online",
        /// When control last saw it.
        last_seen: Option<String> = "LastSeen",
        /// An administrator approved it.
        machine_authorized: bool = "MachineAuthorized",
        /// Its capabilities.
        cap_map: CapMap = "CapMap",
        /// Its key has expired.
        expired: bool = "Expired",
    }
}

record! {
    /// What a node tells of its host.
    Hostinfo {
        /// Its name.
        hostname: String = "Hostname",
        /// Its operating system.
        os: String = "OS",
        /// The program.
        app: String = "App",
    }
}

record! {
    /// A user of the tailnet.
    UserProfile {
        /// The id.
        id: i64 = "ID",
        /// Such as `alice@example.com`.
        login_name: String = "LoginName",
        /// As people write it.
        display_name: String = "DisplayName",
        /// A picture.
        profile_pic_url: String = "ProfilePicURL",
    }
}

record! {
    /// The answer to a ping.
    PingResult {
        /// The address that was pinged.
        ip: String = "IP",
        /// The address of the node that has it.
        node_ip: String = "NodeIP",
        /// MagicDNS name without the domain.
        node_name: String = "NodeName",
        /// Not empty: what went wrong.
        err: String = "Err",
        /// Round trip.
        latency_seconds: f64 = "LatencySeconds",
        /// The answer came directly from this address and port.
        endpoint: String = "Endpoint",
        /// The answer came by this relay region.
        derp_region_id: i64 = "DERPRegionID",
        /// Its code.
        derp_region_code: String = "DERPRegionCode",
        /// The address is this node's own.
        is_local_ip: bool = "IsLocalIP",
    }
}

/// A port of this machine that leads into the tailnet, from [`Node::loopback`](crate::Node::loopback).
#[non_exhaustive]
#[derive(Clone, PartialEq, Eq)]
pub struct Loopback {
    /// Such as `127.0.0.1:41234`.
    pub address: SocketAddr,
    /// The password of SOCKS5; the user is `tsnet`.
    pub proxy_credential: String,
    /// The password of HTTP basic authentication below `/localapi/`, with the header `Sec-Tailscale: localapi`.
    pub local_api_credential: String,
}

impl Loopback {
    pub(crate) fn from_c(b: &[u8]) -> Result<Loopback> {
        let text = |at: usize| {
            let field = b.get(at..at + 64).unwrap_or_default();
            CStr::from_bytes_until_nul(field).ok().and_then(|s| s.to_str().ok()).unwrap_or_default()
        };
        Ok(Loopback {
            address: text(offset_of!(sys::tailnode_loopback_info, address))
                .parse()
                .map_err(|_| Error::new(ErrorKind::Internal, "tailnode: the core gave no address"))?,
            proxy_credential: text(offset_of!(sys::tailnode_loopback_info, proxy_credential)).into(),
            local_api_credential: text(offset_of!(sys::tailnode_loopback_info, local_api_credential)).into(),
        })
    }
}

impl fmt::Debug for Loopback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loopback").field("address", &self.address).finish_non_exhaustive()
        // there are secrets in it
    }
}

/// A kind of ping.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PingType {
    /// Asks the peer's path manager; the answer tells the path.
    Disco,
    /// Asks the peer's node through WireGuard, below its IP stack.
    Tsmp,
    /// An echo request to the peer's IP stack; the peer's access rules apply.
    Icmp,
}

impl PingType {
    pub(crate) fn as_c(self) -> &'static CStr {
        match self {
            PingType::Disco => c"disco",
            PingType::Tsmp => c"TSMP",
            PingType::Icmp => c"ICMP",
        }
    }
}
