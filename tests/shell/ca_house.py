"""A whole CA in a folder: SoftHSM token, registry, hierarchy; and how to break it."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from hsm_sim.tokens import make_token
from provisioning import config
from provisioning.ca.hierarchy import (
    Hierarchy,
    load_hierarchy,
    make_hierarchy,
    make_hmac_key,
)
from provisioning.ca.renew import Own, load_own, make_responder_key, renew_own
from provisioning.enrol.answer import Enrolment
from provisioning.enrol.tokens import TokenSecret, TokenWish, create_enrolment_token
from provisioning.hsm.pkcs11 import open_token
from provisioning.model.errors import OutcomeUnknown, Unavailable
from provisioning.model.ids import DeviceId, Serial
from provisioning.psk.derive import PSK_MASTER
from provisioning.registry.store import Registry
from provisioning.registry.upgrade import upgrade

if TYPE_CHECKING:
    from pathlib import Path

    from provisioning.hsm.session import TokenConfig

PUMP = DeviceId.parse("pump-7")
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


class Clock:
    """A clock that stands until a test moves it."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC).replace(microsecond=0)

    def __call__(self) -> datetime:
        return self.now


class Breakable:
    """Stands before a token or a registry, and loses calls or answers as told.

    `lose[NAME]` is a list of "before" (it did not happen) and "after" (it happened,
    and the answer was lost), used up one a call; everything else passes.
    `error` is what a lost answer raises.
    """

    def __init__(self, inner: object, error: type[Exception] = OutcomeUnknown) -> None:
        self._inner = inner
        self._error = error
        self.lose: dict[str, list[str]] = {}
        self.away = False
        self.calls: list[str] = []
        self.held: dict[str, asyncio.Event] = {}
        self.reached = asyncio.Event()

    def __getattr__(self, name: str):
        found = getattr(self._inner, name)
        if not asyncio.iscoroutinefunction(found):
            return found

        async def call(*arguments, **named):
            self.calls.append(name)
            if self.away and name != "close":
                raise Unavailable("HSM", 0.05)
            if name in self.held:
                self.reached.set()
                await self.held[name].wait()
            plan = self.lose.get(name)
            when = plan.pop(0) if plan else None
            if when == "before":
                raise Unavailable("part", 0.05)
            result = await found(*arguments, **named)
            if when == "after":
                raise self._error(name)
            return result

        return call


@dataclass
class House:
    """The parts, joined as the gateway joins them."""

    config: config.Config
    token: Breakable
    registry: Breakable
    hierarchy: Hierarchy
    own: Own
    clock: Clock
    tasks: asyncio.TaskGroup
    events: list[tuple[str, dict]] = field(default_factory=list)

    def tell(self, name: str, fields) -> None:
        self.events.append((name, dict(fields)))

    def named(self, name: str) -> list[dict]:
        return [fields for found, fields in self.events if found == name]

    def enrolment(self, tasks: asyncio.TaskGroup | None = None) -> Enrolment:
        return Enrolment(
            registry=self.registry,
            token=self.token,
            hierarchy=self.hierarchy,
            policy=self.config.enrolment,
            clock=self.clock,
            random_bytes=secrets.token_bytes,
            tasks=tasks or self.tasks,
            on_event=self.tell,
        )

    async def new_token(
        self, device: DeviceId | None = PUMP, profile: str | None = None, uses: int = 1
    ) -> TokenSecret:
        secret, _ = await create_enrolment_token(
            self.registry,
            self.config.enrolment,
            TokenWish(device, uses, HOUR, profile),
            now=self.clock(),
            actor="test",
            random_bytes=secrets.token_bytes,
        )
        return secret

    async def certificates(self, device: DeviceId = PUMP) -> list:
        view = await self.registry.device(device)
        return [] if view is None else list(view.credentials)

    async def connect(self, der: bytes, times: int = 1):
        """The device connects with this certificate."""
        for _ in range(times):
            found = await self.registry.standing_of_certificate(serial_of(der))
            standing = await self.registry.connected(
                found.credential.id,
                auth="certificate",
                resumed=False,
                address="192.0.2.7",
                now=self.clock(),
                grace=HOUR,
            )
        return standing


@asynccontextmanager
async def made_house(folder: Path):
    """A house with everything made, as `birthmark init` would.

    Made once in a run, beside the tests' own folders; each test gets a copy.
    """
    model = folder.parent / "ca-house-model"
    if model not in _models:
        _models[model] = await _made_model(model)
    made = _models[model]
    data = folder / "data"
    shutil.copytree(model, data)
    conf = data / "hsm" / "softhsm2.conf"
    conf.write_text(conf.read_text().replace(str(model), str(data)))
    settings = config.parse(_TOML, data)
    clock = Clock()
    clock.now = made.at
    registry = Breakable(await Registry.open(settings.registry_url))
    try:
        opened = await open_token(replace(made.token, softhsm_conf=str(conf)))
        token = Breakable(opened)
        try:
            hierarchy, own = load_hierarchy(settings.ca), load_own(settings.ca)
            async with task_group() as tasks:
                yield House(settings, token, registry, hierarchy, own, clock, tasks)
        finally:
            await token.close()
    finally:
        await registry.close()


@dataclass(frozen=True)
class _Model:
    token: TokenConfig
    at: datetime


_models: dict[Path, _Model] = {}
_TOML = config.default_toml(
    org="Test", domain="test.example", hosts=("localhost",), module="unused"
)


async def _made_model(data: Path) -> _Model:
    data.mkdir(mode=0o700)  # noqa: ASYNC240 - nobody else is on this loop
    settings = config.parse(_TOML, data)
    now = Clock()()
    await upgrade(settings.registry_url)
    made = make_token(data / "hsm")
    token = await open_token(made)
    try:
        hierarchy = await make_hierarchy(token, settings.ca, now, secrets.token_bytes)
        await make_responder_key(token)
        await make_hmac_key(token, PSK_MASTER)
        await renew_own(token, settings.ca, hierarchy, now, secrets.token_bytes)
    finally:
        await token.close()
    return _Model(made, now)


@asynccontextmanager
async def task_group():
    """A TaskGroup in a task of its own: fixtures begin and end in different ones."""
    made: asyncio.Future[asyncio.TaskGroup] = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        async with asyncio.TaskGroup() as tasks:
            made.set_result(tasks)
            await asyncio.Event().wait()

    holder = asyncio.create_task(hold())
    try:
        yield await made
    finally:
        holder.cancel()
        with suppress(asyncio.CancelledError):
            await holder


def make_csr(
    key: ec.EllipticCurvePrivateKey | None = None, password: bytes | None = None
) -> bytes:
    """A request that leaves the names out."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if password is not None:
        builder = builder.add_attribute(
            x509.oid.AttributeOID.CHALLENGE_PASSWORD, password
        )
    key = key or ec.generate_private_key(ec.SECP256R1())
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def serial_of(der: bytes) -> Serial:
    return Serial(x509.load_der_x509_certificate(der).serial_number)
