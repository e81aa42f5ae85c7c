"""A Hub on this machine with all that push and pull need; the genuine huggingface_hub is its client.

It keeps repositories, branches, pull requests and large files in memory, knows users by their tokens, and injects
the faults in `Hub.faults`. Its responses are those that huggingface_hub 2.4 reads; where the Hub sends a file from
another host, this one does too (`localhost` for `127.0.0.1`).
"""

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

LARGE = ('.safetensors', '.bin')  # files that are not kept by git
PART = 100_000  # bytes of a large file that are sent in one go
DATE = '2026-01-01T00:00:00.000Z'


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])


@dataclass
class Fault:
    """What goes wrong with the next requests that match, such as 'GET /_cdn'."""

    match: str
    kind: str  # status, drop, cut, reset, short, long, corrupt, lost, silent, nonsense, loop, etag, elsewhere
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class File:
    """A file in a commit: its content, or the hash of a large one that is kept elsewhere."""

    data: bytes | None
    sha256: str | None
    size: int

    @property
    def blob(self) -> str:
        """The hash by which git knows it, or the pointer to it."""
        data = self.data
        if data is None:
            data = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n'.encode()
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 or self.blob


@dataclass
class Repo:
    """A repository: commits (files and parent), and what points at them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, tuple[dict[str, File], str | None]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], parent: str | None) -> str:
        content = repr([sorted((name, file.oid) for name, file in files.items()), parent, len(self.commits)])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files, parent
        return oid

    def find(self, revision: str) -> str:
        found = self.branches.get(revision) or self.pulls.get(revision) or revision
        if found not in self.commits:
            raise Refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return found


class Refusal(Exception):
    def __init__(self, status: int, code: str = '', message: str = '', **body: Any) -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


class Hub(ThreadingHTTPServer):
    """The server. `xet` is a folder for large files that hf_xet keeps, which needs no other server."""

    daemon_threads = True

    def __init__(self, port: int = 0, xet: Path | None = None) -> None:
        super().__init__(('127.0.0.1', port), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.tokens = {'hf_write': ('user', 'write'), 'hf_read': ('user', 'read'), 'hf_other': ('other', 'write')}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.lock = threading.RLock()
        self.xet = xet
        self.closing = threading.Event()  # ends the silence of faults
        self.xet_hashes: dict[str, str] = {}  # by SHA-256
        self.slow = False  # send large files so slowly that a client can be killed meanwhile

    def reset(self, xet: Path | None = None) -> None:
        """Forgets everything."""
        for kept in (self.repos, self.large, self.parts, self.faults, self.log, self.xet_hashes):
            kept.clear()
        self.closing = threading.Event()
        self.xet = xet

    def end_silence(self) -> None:
        """Hangs up where faults made it silent, and waits for the calls that nobody waits for any more."""
        self.closing.set()
        if self.xet:
            sys.modules['huggingface_hub.utils._xet'].abort_xet_session()
        for thread in threading.enumerate():
            if thread.name == 'timm_res2net.hub':
                thread.join(20)

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        """What is in a repository, without files that hf_xet keeps."""
        repo = self.repos[repo_id]
        found = repo.commits[repo.find(revision)][0].items()
        kept = {name: file for name, file in found if file.sha256 not in self.xet_hashes}
        return {name: self.large[str(file.sha256)] if file.data is None else file.data for name, file in kept.items()}

    def put(self, repo_id: str, files: dict[str, bytes], **settings: Any) -> str:
        """Makes a repository, or a commit in it, without any client."""
        repo = self.repos.setdefault(repo_id, Repo(**settings))
        made = {}
        for name, data in files.items():
            large = name.endswith(LARGE)
            digest = hashlib.sha256(data).hexdigest()
            if large:
                self.large[digest] = data
            made[name] = File(None if large else data, digest if large else None, len(data))
        parent = repo.branches.get('main')
        repo.branches['main'] = repo.commit({**(repo.commits[parent][0] if parent else {}), **made}, parent)
        return repo.branches['main']

    def find_xet_hashes(self) -> None:
        """Reads, of the files that hf_xet stored, which SHA-256 has which hash of Xet's.

        A shard of its store is a header of 48 bytes, then for each file a record of 48 (hash, flags, number of
        segments), one for each segment, as many again and one more if the flags say so; that begins with the SHA-256.
        """

        def text(raw: bytes) -> str:
            return ''.join(f'{part:016x}' for part in struct.unpack('<4Q', raw))

        for shard in (self.xet or Path('/nowhere')).rglob('shards/*.mdb'):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] != b'\xff' * 32:
                flags, segments = struct.unpack_from('<II', data, at + 32)
                name = text(data[at : at + 32])
                at += 48 * (1 + segments + (segments if flags & 1 << 31 else 0))
                if flags & 1 << 30:
                    self.xet_hashes[text(data[at : at + 32])] = name
                    at += 48


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []


def route(method: str, path: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a method of the handler for requests of this kind; {id} is a repository, {rev} a revision."""
    parts = {'{id}': r'([\w.-]+/[\w.-]+)', '{rev}': r'([^/]+)', '{sha}': r'(\w+)', '{path}': r'(.+)'}
    for name, pattern in parts.items():
        path = path.replace(name, pattern)

    def register(function: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((method, re.compile(path), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # 40 ms an answer otherwise
    server: Hub

    def log_message(self, *args: Any) -> None: ...

    def answer(self, body: Any = b'', status: int = 200, **headers: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {'Content-Length': len(data), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.server.log.append(f'{self.command} {self.path}')
        self.fault = self.next_fault()
        try:
            if self.fault and self.fault.kind == 'status':
                return self.answer({'error': 'out of order'}, self.fault.status, **self.fault.headers)
            if self.fault and self.fault.kind == 'drop':
                return self.hang_up()
            if self.fault and self.fault.kind == 'silent':
                self.server.closing.wait(30)
                return self.hang_up()
            if self.fault and self.fault.kind == 'nonsense':
                return self.answer(b'<html>Welcome to our hotel</html>')
            if self.fault and self.fault.kind == 'loop':
                return self.answer(b'', 302, Location=self.path)
            for method, pattern, function in ROUTES:
                match = pattern.fullmatch(url.path)
                if match and method == self.command.replace('HEAD', 'GET'):
                    return function(self, *(unquote(part) for part in match.groups()))
            raise Refusal(404, message=f'there is no {self.command} {self.path}')
        except Refusal as refusal:
            told = {'X-Error-Code': refusal.code, 'X-Error-Message': refusal.message}
            headers = {name: value for name, value in told.items() if value}
            self.answer({'error': refusal.message, **refusal.body}, refusal.status, **headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def next_fault(self) -> Fault | None:
        with self.server.lock:
            for fault in self.server.faults:
                if fault.times and re.search(fault.match, f'{self.command} {self.path}'):
                    fault.times -= 1
                    return fault
        return None

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    @property
    def host(self) -> str:
        return f'http://{self.headers["Host"]}'

    def user(self, write: bool = False) -> str | None:
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if token and token not in self.server.tokens:
            raise Refusal(401, message='Invalid credentials in Authorization header')
        name, role = self.server.tokens.get(token, (None, None))
        if write and role != 'write':
            raise Refusal(403 if name else 401, message='Your token does not have write permission')
        return name

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        user = self.user(write)
        owner = repo_id.split('/')[0]
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and user != owner):
            raise Refusal(404 if user else 401, 'RepoNotFound', 'Repository not found')
        if write and user != owner:
            raise Refusal(403, message="You don't have the rights to write to this repository")
        return repo

    def open_repo(self, repo_id: str) -> Repo:
        repo = self.repo(repo_id)
        if repo.gated and self.user() != repo_id.split('/')[0]:
            raise Refusal(403 if self.user() else 401, 'GatedRepo', f'Access to model {repo_id} is restricted')
        return repo

    # Repositories

    @route('POST', '/api/repos/create')
    def create(self) -> None:
        wanted = json.loads(self.body)
        user = self.user(write=True)
        repo_id = f'{wanted.get("organization") or user}/{wanted["name"]}'
        url = f'{self.host}/{repo_id}'
        if repo_id in self.server.repos:
            raise Refusal(409, message='You already created this model repo', url=url)
        if repo_id.split('/')[0] != user:
            raise Refusal(403, message="You don't have the rights to create a model under this name")
        attributes = b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'
        private = wanted.get('visibility') == 'private' or wanted.get('private', False)  # as older clients say it
        self.server.put(repo_id, {'.gitattributes': attributes}, private=private)
        self.answer({'url': url})

    @route('GET', '/api/models/{id}')
    def info(self, repo_id: str, revision: str = 'main') -> None:
        repo = self.repo(repo_id)
        commit = repo.find(revision)
        siblings = [{'rfilename': name} for name in repo.commits[commit][0]]
        about = {'private': repo.private, 'gated': repo.gated, 'tags': [], 'lastModified': DATE, 'createdAt': DATE}
        self.answer({'id': repo_id, 'modelId': repo_id, 'sha': commit, 'siblings': siblings, **about})

    route('GET', '/api/models/{id}/revision/{rev}')(info)

    def entry(self, name: str, file: File) -> dict[str, Any]:
        told: dict[str, Any] = {'type': 'file', 'path': name, 'size': file.size, 'oid': file.blob}
        if file.sha256:
            told['lfs'] = {'oid': file.sha256, 'size': file.size, 'pointerSize': 130}
        if file.sha256 in self.server.xet_hashes:
            told['xetHash'] = self.server.xet_hashes[file.sha256]
        return told

    @route('GET', '/api/models/{id}/tree/{rev}/?')
    def tree(self, repo_id: str, revision: str) -> None:
        repo = self.open_repo(repo_id)
        self.answer([self.entry(name, file) for name, file in repo.commits[repo.find(revision)][0].items()])

    @route('POST', '/api/models/{id}/paths-info/{rev}')
    def paths(self, repo_id: str, revision: str) -> None:
        repo = self.open_repo(repo_id)
        files = repo.commits[repo.find(revision)][0]
        asked = [value for key, value in parse_qsl(self.body.decode()) if key == 'paths']
        self.answer([self.entry(name, files[name]) for name in asked if name in files])

    @route('GET', '/api/models/{id}/commits/{rev}')
    def history(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        told, commit = [], repo.branches.get(revision)
        while commit is not None:
            told.append({'id': commit, 'title': '', 'message': '', 'date': DATE, 'authors': []})
            commit = repo.commits[commit][1]
        self.answer(told)

    @route('GET', '/api/models/{id}/refs')
    def refs(self, repo_id: str) -> None:
        repo = self.repo(repo_id)

        def told(prefix: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{'name': name, 'ref': prefix + name, 'targetCommit': oid} for name, oid in refs.items()]

        pulls = {'pullRequests': told('', repo.pulls)} if 'include_prs' in self.query else {}
        self.answer({'branches': told('refs/heads/', repo.branches), 'converts': [], 'tags': [], **pulls})

    @route('POST', '/api/models/{id}/branch/{rev}')
    def branch(self, repo_id: str, name: str) -> None:
        repo = self.repo(repo_id, write=True)
        if name in repo.branches:
            raise Refusal(409, message='Reference already exists')
        repo.branches[name] = repo.find(json.loads(self.body or b'{}').get('startingPoint', 'main'))
        self.answer({})

    @route('POST', '/api/validate-yaml')
    def validate(self) -> None:
        content = json.loads(self.body)['content']
        errors = [] if content.startswith('---\n') else [{'message': 'no metadata'}]
        if 'license: made-up' in content:
            errors.append({'message': '"license" must be one of'})
        self.answer({'errors': errors, 'warnings': []}, 400 if errors else 200)

    # Uploads

    @route('POST', '/api/models/{id}/preupload/{rev}')
    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, write='create_pr' not in self.query)
        files = repo.commits[repo.find(revision)][0]
        told = []
        for file in json.loads(self.body)['files']:
            mode = 'lfs' if file['path'].endswith(LARGE) else 'regular'
            present = {'oid': files[file['path']].oid} if file['path'] in files else {}
            told.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False, **present})
        self.answer({'files': told})

    @route('POST', '/{id}.git/info/lfs/objects/batch')
    def batch(self, repo_id: str) -> None:
        self.repo(repo_id, write=True)
        told = []
        for wanted in json.loads(self.body)['objects']:
            oid, size = wanted['oid'], wanted['size']
            entry: dict[str, Any] = {'oid': oid, 'size': size}
            if oid not in self.server.large:
                place = f'{self.host}/_large/{oid}'
                upload: dict[str, Any] = {'href': place}
                if size > PART:
                    parts = {f'{n + 1:05}': f'{place}/{n + 1}' for n in range(-(-size // PART))}
                    upload = {'href': f'{place}/complete', 'header': {'chunk_size': str(PART), **parts}}
                entry['actions'] = {'upload': upload, 'verify': {'href': f'{place}/verify'}}
            told.append(entry)
        self.answer({'transfer': 'basic', 'objects': told}, Content_Type='application/vnd.git-lfs+json')

    @route('PUT', '/_large/{sha}')
    def put_large(self, oid: str) -> None:
        damaged = self.fault is not None and self.fault.kind == 'corrupt'
        self.server.large[oid] = self.body[:-1] + bytes([self.body[-1] ^ 1]) if damaged else self.body
        self.answer()

    @route('PUT', '/_large/{sha}/(\\d+)')
    def put_part(self, oid: str, number: str) -> None:
        self.server.parts.setdefault(oid, {})[int(number)] = self.body
        self.answer(ETag=f'"{number}"')

    @route('POST', '/_large/{sha}/complete')
    def complete(self, oid: str) -> None:
        parts = self.server.parts.pop(oid)
        assert [part['partNumber'] for part in json.loads(self.body)['parts']] == sorted(parts)
        self.server.large[oid] = b''.join(parts[number] for number in sorted(parts))
        self.answer({})

    @route('POST', '/_large/{sha}/verify')
    def verify(self, oid: str) -> None:
        if hashlib.sha256(self.server.large[oid]).hexdigest() != oid:
            del self.server.large[oid]
            raise Refusal(422, message='The hash of the file is wrong')
        self.answer({})

    @route('POST', '/api/models/{id}/commit/{rev}')
    def commit(self, repo_id: str, revision: str) -> None:
        proposal = 'create_pr' in self.query
        repo = self.repo(repo_id, write=not proposal)
        header, *operations = (json.loads(line) for line in self.body.splitlines() if line.strip())
        with self.server.lock:
            base = repo.find(revision)
            if header['value'].get('parentCommit') not in (None, base):
                raise Refusal(412, message='A commit has happened since. Please refresh and try again.')
            self.server.find_xet_hashes()
            files = dict(repo.commits[base][0])
            for operation in operations:
                value = operation['value']
                if operation['key'] == 'file':
                    data = base64.b64decode(value['content'])
                    if self.fault and self.fault.kind == 'corrupt':
                        data += b' '
                    files[value['path']] = File(data, None, len(data))
                elif operation['key'] == 'lfsFile':
                    if value['oid'] not in self.server.large and value['oid'] not in self.server.xet_hashes:
                        raise Refusal(400, message='A pointer points to a file that does not exist')
                    files[value['path']] = File(None, value['oid'], value['size'])
            oid = repo.commit(files, base)
            pull = f'refs/pr/{len(repo.pulls) + 1}'
            if proposal:
                repo.pulls[pull] = oid
            else:
                repo.branches[revision] = oid
        if self.fault and self.fault.kind == 'lost':
            self.hang_up()
            return
        address = {'pullRequestUrl': f'{self.host}/{repo_id}/discussions/{pull[8:]}'} if proposal else {}
        self.answer({'commitOid': oid, 'commitUrl': f'{self.host}/{repo_id}/commit/{oid}', **address})

    # Downloads

    @route('GET', '/{id}/resolve/{rev}/{path}')
    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self.open_repo(repo_id)
        commit = repo.find(revision)
        file = repo.commits[commit][0].get(name)
        told = {'X-Repo-Commit': commit, 'Accept-Ranges': 'bytes'}
        if self.fault and self.fault.kind == 'etag' and file is not None:
            self.answer(b'', **told, ETag='"../../../outside"')
        elif file is None:
            self.answer(b'', 404, **told, **{'X-Error-Code': 'EntryNotFound', 'X-Error-Message': 'Entry not found'})
        elif file.data is not None:
            self.send_content(file.data, **told, ETag=f'"{file.oid}"')
        else:
            told |= {'X-Linked-Etag': f'"{file.oid}"', 'X-Linked-Size': str(file.size)}
            if file.oid in self.server.xet_hashes:
                token = f'{self.host}/api/models/{repo_id}/xet-read-token/{commit}'
                told |= {'X-Xet-Hash': self.server.xet_hashes[file.oid], 'Link': f'<{token}>; rel="xet-auth"'}
            elsewhere = self.host.replace('127.0.0.1', 'localhost')
            self.answer(b'', 302, **told, Location=f'{elsewhere}/_cdn/{file.oid}?name={quote(name)}')

    @route('GET', '/_cdn/{sha}')
    def cdn(self, oid: str) -> None:
        if self.headers.get('Authorization'):
            raise Refusal(400, message='a token was sent to another host')
        while self.server.slow:
            time.sleep(0.05)
        self.send_content(self.server.large[oid], Accept_Ranges='bytes')

    def send_content(self, data: bytes, **headers: str) -> None:
        """Sends a file, or the requested range, or the part that a fault leaves of it."""
        kind = self.fault.kind if self.fault else ''
        match = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        start = int(match[1]) if match else 0
        data = data[start:]
        if kind == 'corrupt':
            data = data[:-1] + bytes([data[-1] ^ 1])
        status = 206 if match else 200
        if kind == 'long' and self.command == 'GET':
            self.close_connection = True
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data + b'more')
            return None
        if kind == 'short':
            return self.answer(data[: len(data) // 2], status, **headers)
        if kind in ('cut', 'reset') and self.command == 'GET':
            self.send_response(status)
            for name, value in {**headers, 'Content-Length': str(len(data))}.items():
                self.send_header(name.replace('_', '-'), value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(0.05)
            if kind == 'reset':
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                self.close_connection = True
                return self.connection.close()
            return self.hang_up()
        return self.answer(data, status, **headers)

    @route('GET', '/api/models/{id}/xet-(?:read|write)-token/{rev}')
    def xet_token(self, repo_id: str, revision: str) -> None:
        self.repo(repo_id)
        elsewhere = self.fault is not None and self.fault.kind == 'elsewhere'
        store = f'{self.host}/_store' if elsewhere else f'local://{self.server.xet}'
        told = {'X-Xet-Cas-Url': store, 'X-Xet-Access-Token': 'token', 'X-Xet-Token-Expiration': '4000000000'}
        self.answer({'casUrl': store, 'accessToken': 'token', 'exp': 4_000_000_000}, **told)


if __name__ == '__main__':
    server = Hub(int(sys.argv[1]))
    print(f'http://127.0.0.1:{server.server_port}', flush=True)
    server.serve_forever()
