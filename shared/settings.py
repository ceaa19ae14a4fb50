"""Every setting of every service; shared/settings_sources.py reads them."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from shared.planning.profiles import DEFAULT_PROFILE

Seconds = Annotated[float, Meta(gt=0)]


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting of every service, each with type, default and meaning."""

    # --- common ---
    data_dir: Annotated[str, Meta(description="folder for all persistent data")] = "~/.podium"
    log_format: Annotated[str, Meta(pattern="^(console|json)$", description="console or json")] = "console"
    log_level: Annotated[
        str, Meta(pattern="^(debug|info|warning|error)$", description="debug, info, warning or error")
    ] = "info"
    slots: Annotated[
        tuple[str, ...],
        Meta(min_length=1, description="names of all slots of this fleet, none twice"),
    ] = ("a", "b")

    # --- NATS ---
    nats_url: Annotated[str, Meta(description="the broker")] = "nats://127.0.0.1:4222"
    nats_nkey_seed_file: Annotated[
        str | None,
        Meta(
            description="file with this service's NKey seed, or the folder `podium keys` made; "
            "none = no authentication"
        ),
    ] = None
    nats_ca_file: Annotated[
        str | None, Meta(description="certificate of the CA that signed the broker's; none = no TLS")
    ] = None
    nats_connect_timeout_s: Annotated[
        Seconds, Meta(description="how long a service waits for the broker when it starts")
    ] = 30.0
    broker_patience_s: Annotated[
        Seconds,
        Meta(description="`podium up` restarts a broker that fails to store or respond for this long"),
    ] = 30.0
    nats_replicas: Annotated[
        int, Meta(ge=1, le=5, description="replicas of streams when they are created")
    ] = 1
    log_max_bytes: Annotated[
        int,
        Meta(
            ge=1 << 20,
            description="size limit of JOBS and of each slot's log of states; a full one refuses records",
        ),
    ] = 1 << 30

    # --- gateway ---
    gateway_host: Annotated[str, Meta(description="address the gateway listens on")] = "127.0.0.1"
    gateway_port: Annotated[int, Meta(ge=0, le=65535, description="its port; 0 = any free one")] = 7999
    gateway_id: Annotated[str, Meta(description="this gateway's name in records")] = ""
    public_address: Annotated[
        str | None,
        Meta(description="where upstream reaches this gateway, as posted on chain: host:port; for doctor"),
    ] = None
    api_token_file: Annotated[
        str | None,
        Meta(
            description="file with the tokens of /v1, one per line, or the folder `podium keys` made; "
            "commands send the first; none = no tokens, only local requests are accepted"
        ),
    ] = None
    metrics_open: Annotated[
        bool,
        Meta(description="open /metrics to everyone; else it needs a token or a local request"),
    ] = False
    expected_hardware: Annotated[
        str,
        Meta(description="hardware a slot must report for the hardware bonus: cpu, or like 4xH100-80GB"),
    ] = "4xH100-80GB"
    max_body_bytes: Annotated[
        int, Meta(ge=1024, description="largest request body; a larger one gets 413")
    ] = 1 << 20
    max_connections: Annotated[
        int,
        Meta(ge=16, description="most open connections; above it those that wait longest are closed"),
    ] = 2048
    max_connections_per_address: Annotated[
        int, Meta(ge=4, description="of one address; loopback, and so a proxy there, has no such limit")
    ] = 512
    max_hours: Annotated[float, Meta(gt=0, description="offers with more hours are rejected")] = 96.0
    hub_look_s: Annotated[
        float,
        Meta(
            ge=0,
            le=1.0,
            description="how long an offer waits for its model's config from hub_url before it is accepted; "
            "0 = the hub is not asked, and names decide",
        ),
    ] = 0.8
    deadline_margin_s: Annotated[
        float,
        Meta(ge=0, description="deadline = receipt + hours - this: upstream's clock starts earlier"),
    ] = 150.0
    policy: Annotated[
        str,
        Meta(
            min_length=1,
            description="the policy that decides on offers: maximum_accuracy, expected_value, first_come, or "
            "module:function; see docs/deciding.md",
        ),
    ] = "maximum_accuracy"
    prior_strength: Annotated[
        float,
        Meta(gt=0, le=1e6, description="number of trials that a learned rate's house value counts as"),
    ] = 10.0
    evidence_half_life_days: Annotated[
        float,
        Meta(gt=0, le=36500, description="days after which evidence counts half"),
    ] = 30.0
    min_points_per_hour: Annotated[
        float, Meta(description="policy expected_value accepts offers expected to earn more points than this")
    ] = 0.0
    reservation_s: Annotated[
        Seconds, Meta(description="how long an accepted offer without data holds a slot")
    ] = 900.0
    hotkey: Annotated[
        str | None,
        Meta(description="this miner's own ss58 address; signed requests to any other address are refused"),
    ] = None
    upstream_auth: Annotated[
        str,
        Meta(
            pattern="^(signed|off)$",
            description="signed = upstream's requests carry sr25519 signatures; off = no signature needed, "
            "for a gateway that listens on loopback only",
        ),
    ] = "signed"
    upstream_validators: Annotated[
        tuple[str, ...],
        Meta(description="ss58 addresses whose signed requests are accepted, whatever their stake"),
    ] = ()
    upstream_nodes_file: Annotated[
        str | None,
        Meta(description="the subnet's nodes with their stakes, as fiber's nodes.json; read when it changes"),
    ] = None
    upstream_min_stake: Annotated[
        float, Meta(ge=0, description="stake that a validator in upstream_nodes_file must have")
    ] = 1000.0
    upstream_model_hash: Annotated[
        bool,
        Meta(description="send the submission's hash upstream; a right one gains nothing, a wrong one loses"),
    ] = False
    training_repo: Annotated[
        str | None, Meta(description="repository of this miner's text trainer, for GET /training_repo/text")
    ] = None
    training_commit: Annotated[
        str | None, Meta(description="commit of training_repo, 40 hexadecimal digits")
    ] = None
    training_repos_file: Annotated[
        str | None,
        Meta(
            description="JSON file with the repository, commit, token and data sets for each kind of task, "
            "read at every request; used instead of the two settings above, see docs/tournament.md"
        ),
    ] = None
    unclaimed_s: Annotated[
        Seconds, Meta(description="a job that no node has claimed for this long moves to a free, live slot")
    ] = 60.0
    expire_after_s: Annotated[
        Seconds, Meta(description="a gateway expires a job without a result this long after its deadline")
    ] = 900.0

    # --- trainer node ---
    slot: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,32}$", description="the slot this node serves")] = "a"
    node_dir: Annotated[
        str | None, Meta(description="this node's work folder; none = <data_dir>/nodes/<slot>")
    ] = None
    worker_environment: Annotated[
        tuple[str, ...],
        Meta(description="further environment variables of workers, such as HF_TOKEN for gated models"),
    ] = ()
    gpus: Annotated[
        str | None, Meta(description="GPU indices of this slot, such as 0,1,2,3; none = all that are visible")
    ] = None
    hardware: Annotated[
        str,
        Meta(description="auto = GPUs, or a CPU if there are none; gpu = never a CPU; or a name such as cpu"),
    ] = "auto"
    self_test: Annotated[
        str,
        Meta(
            pattern="^(auto|on|off)$",
            description="test this slot's devices when its node starts; auto = on GPUs, unless they passed "
            "without a warning and nothing was started or upgraded since",
        ),
    ] = "auto"
    threads: Annotated[
        int, Meta(ge=0, description="CPU threads of the worker; 0 = this slot's share of the cores")
    ] = 0
    own_memory_limit: Annotated[
        bool,
        Meta(
            description="the memory limit of the node's unit or container is this slot's alone: a slot of "
            "GPUs may use all of it; else the slots share it, as under `podium up`"
        ),
    ] = False
    profile: Annotated[
        str, Meta(description="recipe of every job; auto searches for the best run, see docs/search.md")
    ] = DEFAULT_PROFILE
    seed: Annotated[int, Meta(ge=0, description="seed of data order, adapters and dropout")] = 0
    models: Annotated[dict[str, str], Meta(description="upstream model id -> local folder or GGUF file")] = {}
    models_dir: Annotated[
        str | None,
        Meta(description="folder with local models as <org>--<name> or <name>; used after `models`"),
    ] = None
    dataset_roots: Annotated[
        tuple[str, ...],
        Meta(description="folders an offer's local data path may lie in; none = only URLs and data set ids"),
    ] = ()
    allow_private_urls: Annotated[
        bool, Meta(description="let data URLs reach private and loopback addresses")
    ] = False
    artifacts_dir: Annotated[
        str | None, Meta(description="where submissions are stored; none = <data_dir>/artifacts")
    ] = None
    artifacts_kind: Annotated[
        str,
        Meta(
            pattern="^(disk|object|hub)$",
            description="where submissions go: disk = artifacts_dir only; object = also an object store of "
            "the broker, for small ones; hub = also a repository on a Hugging Face hub",
        ),
    ] = "disk"
    artifacts_object_max_bytes: Annotated[
        int,
        Meta(ge=1 << 10, le=1 << 28, description="largest submission for an object store"),
    ] = 64 << 20
    artifacts_bucket_max_bytes: Annotated[
        int,
        Meta(ge=1 << 20, description="size limit of a slot's object store; a full one refuses new objects"),
    ] = 1 << 30
    artifacts_keep_s: Annotated[Seconds, Meta(description="how long an object store keeps a submission")] = (
        14 * 86400.0
    )
    hub_url: Annotated[str, Meta(description="the hub")] = "https://huggingface.co"
    hub_download_bytes_per_s: Annotated[
        float,
        Meta(gt=0, description="how fast models without a local copy arrive, until a node has measured it"),
    ] = 100e6
    hub_upload_bytes_per_s: Annotated[
        float, Meta(gt=0, description="how fast submissions are uploaded, until a node has measured it")
    ] = 50e6
    hub_namespace: Annotated[
        str | None, Meta(description="user or organisation on the hub that submissions go to")
    ] = None
    hub_token_file: Annotated[
        str | None, Meta(description="file with a token that may write to it; none = the variable HF_TOKEN")
    ] = None
    hub_private: Annotated[
        bool, Meta(description="create private repositories, which upstream can't read")
    ] = False
    hub_xet: Annotated[
        bool, Meta(description="upload by the hub's xet protocol, in pieces; else whole files by LFS")
    ] = False
    hub_silence_s: Annotated[
        Seconds, Meta(description="a hub that is silent for this long counts as unreachable")
    ] = 60.0
    worker_command: Annotated[
        tuple[str, ...],
        Meta(description="command that runs a job.json; none = the training engine in this Python"),
    ] = ()
    lease_ttl_s: Annotated[
        float, Meta(ge=1, description="a lease that is not renewed for this long is free")
    ] = 10.0
    lease_renew_s: Annotated[Seconds, Meta(description="how often a lease is renewed")] = 2.0
    lease_trust_s: Annotated[
        Seconds, Meta(description="a node without a confirmed renewal for this long writes nothing")
    ] = 8.0
    heartbeat_s: Annotated[Seconds, Meta(description="time between heartbeats")] = 1.0
    heartbeat_missing_s: Annotated[
        Seconds, Meta(description="a slot without a heartbeat for this long counts as down")
    ] = 5.0
    poll_s: Annotated[Seconds, Meta(description="how often a node polls for work without a message")] = 5.0
    max_attempts: Annotated[
        int, Meta(ge=1, description="worker deaths without progress before a job fails")
    ] = 3
    hang_s: Annotated[
        Seconds, Meta(description="a worker without progress for this long is killed and resumed")
    ] = 900.0
    stop_grace_s: Annotated[Seconds, Meta(description="how long a worker may take to stop")] = 60.0
    submit_reserve_s: Annotated[
        Seconds, Meta(description="time kept before the deadline for storing the submission")
    ] = 30.0
    checkpoint_interval_s: Annotated[
        Seconds,
        Meta(
            description="least time between two checkpoints; "
            "they are rarer if saving takes over 2% of the time"
        ),
    ] = 60.0

    @property
    def data(self) -> Path:
        """Return the data folder, expanded."""
        return Path(self.data_dir).expanduser()

    @property
    def node(self) -> Path:
        """Return the node's work folder, expanded."""
        return Path(self.node_dir).expanduser() if self.node_dir else self.data / "nodes" / self.slot

    @property
    def artifacts(self) -> Path:
        """Return where submissions are stored, expanded."""
        return Path(self.artifacts_dir).expanduser() if self.artifacts_dir else self.data / "artifacts"

    @property
    def gateway_name(self) -> str:
        """Return this gateway's name in records: as set, else host name and process id."""
        return self.gateway_id or f"{socket.gethostname()}-{os.getpid()}"
