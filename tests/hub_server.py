"""A local stand-in for the Hub, in memory: everything that push and pull need, with injected faults.

The tests use the real huggingface_hub with it; its responses are those that huggingface_hub 2.4 expects. Like the real
Hub, it serves large files from another host (`localhost` instead of `127.0.0.1`).
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

LARGE = ('.safetensors', '.bin')  # stored outside Git
DATE = '2026-01-01T00:00:00.000Z'


def free_port() -> int:
    """Returns a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])


@dataclass
class Fault:
    """A fault to inject into the next `times` requests that match a pattern, such as 'GET /_cdn'.

    Kinds: 'status', 'drop' (hang up), 'cut' (hang up halfway), 'corrupt' (flip a bit),
    'lost' (commit, then hang up), 'nonsense' (a web page).
    """

    match: str
    kind: str
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class File:
    """A file in a commit. Large files are stored outside Git."""

    data: bytes
    is_large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob(self) -> str:
        """Git's hash of the file, or of the pointer to a large one."""
        pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n'
        data = pointer.encode() if self.is_large else self.data
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.is_large else self.blob


@dataclass
class Repo:
    """A repository: the files of its commits, and the last commits of its branches and pull requests (refs/pr/N)."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], branch: str) -> str:
        content = repr([sorted((name, file.oid) for name, file in files.items()), len(self.commits)])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str:
        found = self.branches.get(revision, revision)
        if found not in self.commits:
            raise Refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return found

    def files(self, revision: str) -> dict[str, File]:
        return self.commits[self.find(revision)]


class Refusal(Exception):
    """An HTTP error."""

    def __init__(self, status: int, code: str = '', message: str = '', **body: Any) -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


class Hub(ThreadingHTTPServer):
    """The server."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(('127.0.0.1', port), Handler)
        self.tokens = {'hf_write': ('user', 'write'), 'hf_read': ('user', 'read'), 'hf_other': ('other', 'write')}
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Deletes everything."""
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.faults: list[Fault] = []
        self.log: list[str] = []

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        """Returns the files of a repository."""
        return {name: file.data for name, file in self.repos[repo_id].files(revision).items()}

    def put(self, repo_id: str, files: dict[str, bytes], **settings: Any) -> str:
        """Creates a repository, or a commit in it, without a client."""
        repo = self.repos.setdefault(repo_id, Repo(**settings))
        old = repo.files('main') if repo.branches else {}
        made = {name: File(data, name.endswith(LARGE)) for name, data in files.items()}
        self.large |= {file.sha256: file.data for file in made.values() if file.is_large}
        return repo.commit({**old, **made}, 'main')


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []


def route(method: str, path: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a method of the handler; {id} is a repository, {rev} a revision."""
    for name, pattern in {'{id}': r'([\w.-]+/[\w.-]+)', '{rev}': r'([^/]+)', '{sha}': r'(\w+)'}.items():
        path = path.replace(name, pattern)

    def register(function: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((method, re.compile(path), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # it adds 40 ms to each response
    server: Hub

    def log_message(self, *args: Any) -> None: ...

    def answer(self, body: Any = b'', status: int = 200, **headers: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {'Content-Length': len(data), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            is_cut = self.fault is not None and self.fault.kind == 'cut'
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
            if is_cut:
                self.hang_up()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.server.log.append(f'{self.command} {self.path}')
        self.fault = self.next_fault()
        kind = self.fault.kind if self.fault else ''
        try:
            if self.fault and kind == 'status':
                return self.answer({'error': 'out of order'}, self.fault.status, **self.fault.headers)
            if kind == 'drop':
                return self.hang_up()
            if kind == 'nonsense':
                return self.answer(b'<html>Welcome to our hotel</html>')
            for method, pattern, function in ROUTES:
                match = pattern.fullmatch(url.path)
                if match and method == self.command.replace('HEAD', 'GET'):
                    return function(self, *(unquote(part) for part in match.groups()))
            raise Refusal(404, message=f'no route for {self.command} {self.path}')
        except Refusal as refusal:
            headers = {'X-Error-Code': refusal.code, 'X-Error-Message': refusal.message}
            headers = {name: value for name, value in headers.items() if value}
            self.answer({'error': refusal.message, **refusal.body}, refusal.status, **headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

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

    def repo(self, repo_id: str, write: bool = False, read: bool = False) -> Repo:
        user, owner, repo = self.user(write), repo_id.split('/')[0], self.server.repos.get(repo_id)
        if repo is None:
            raise Refusal(404 if user else 401, 'RepoNotFound', 'Repository not found')
        if write and user != owner:
            raise Refusal(403, message="You don't have the rights to write to this repository")
        if read and repo.gated and user != owner:
            raise Refusal(403 if user else 401, 'GatedRepo', f'Access to model {repo_id} is restricted')
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
        private = wanted.get('visibility') == 'private' or wanted.get('private', False)  # the latter: before 2.0
        self.server.put(repo_id, {'.gitattributes': b'*.safetensors filter=lfs -text\n'}, private=private)
        self.answer({'url': url})

    @route('GET', '/api/models/{id}')
    def info(self, repo_id: str, revision: str = 'main') -> None:
        repo = self.repo(repo_id)
        commit = repo.find(revision)
        about = {'private': repo.private, 'gated': repo.gated, 'tags': [], 'lastModified': DATE, 'createdAt': DATE}
        siblings = [{'rfilename': name} for name in repo.commits[commit]]
        self.answer({'id': repo_id, 'modelId': repo_id, 'sha': commit, 'siblings': siblings, **about})

    route('GET', '/api/models/{id}/revision/{rev}')(info)

    @route('GET', '/api/models/{id}/tree/{rev}/?')
    def tree(self, repo_id: str, revision: str) -> None:
        entries = []
        for name, file in self.repo(repo_id, read=True).files(revision).items():
            size = len(file.data)
            entry: dict[str, Any] = {'type': 'file', 'path': name, 'size': size, 'oid': file.blob}
            if file.is_large:
                entry['lfs'] = {'oid': file.sha256, 'size': size, 'pointerSize': 130}
            entries.append(entry)
        self.answer(entries)

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
        files = self.repo(repo_id, write='create_pr' not in self.query).files(revision)
        modes = []
        for file in json.loads(self.body)['files']:
            mode = 'lfs' if file['path'].endswith(LARGE) else 'regular'
            present = {'oid': files[file['path']].oid} if file['path'] in files else {}
            modes.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False, **present})
        self.answer({'files': modes})

    @route('POST', '/{id}.git/info/lfs/objects/batch')
    def batch(self, repo_id: str) -> None:
        self.repo(repo_id, write=True)
        objects = json.loads(self.body)['objects']
        for wanted in objects:
            if wanted['oid'] not in self.server.large:
                place = f'{self.host}/_large/{wanted["oid"]}'
                wanted['actions'] = {'upload': {'href': place}, 'verify': {'href': f'{place}/verify'}}
        self.answer({'transfer': 'basic', 'objects': objects}, Content_Type='application/vnd.git-lfs+json')

    @route('PUT', '/_large/{sha}')
    def put_large(self, oid: str) -> None:
        self.server.large[oid] = self.damage(self.body)
        self.answer()

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
            files = dict(repo.commits[base])
            for operation in operations:
                value = operation['value']
                if operation['key'] == 'file':
                    files[value['path']] = File(self.damage(base64.b64decode(value['content'])))
                elif operation['key'] == 'lfsFile':
                    if value['oid'] not in self.server.large:
                        raise Refusal(400, message='A pointer points to a file that does not exist')
                    files[value['path']] = File(self.server.large[value['oid']], is_large=True)
            number = len(repo.branches)  # of a pull request
            oid = repo.commit(files, f'refs/pr/{number}' if proposal else revision)
        if self.fault and self.fault.kind == 'lost':
            return self.hang_up()
        address = {'pullRequestUrl': f'{self.host}/{repo_id}/discussions/{number}'} if proposal else {}
        return self.answer({'commitOid': oid, 'commitUrl': f'{self.host}/{repo_id}/commit/{oid}', **address})

    # Downloads

    @route('GET', '/{id}/resolve/{rev}/(.+)')
    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self.repo(repo_id, read=True)
        commit = repo.find(revision)
        file = repo.commits[commit].get(name)
        headers = {'X-Repo-Commit': commit, 'Accept-Ranges': 'bytes'}
        if file is None:
            raise Refusal(404, 'EntryNotFound', 'Entry not found')
        if not file.is_large:
            self.send_content(file.data, **headers, ETag=f'"{file.oid}"')
        else:
            headers |= {'X-Linked-Etag': f'"{file.oid}"', 'X-Linked-Size': str(len(file.data))}
            elsewhere = self.host.replace('127.0.0.1', 'localhost')
            self.answer(b'', 302, **headers, Location=f'{elsewhere}/_cdn/{file.oid}?name={quote(name)}')

    @route('GET', '/_cdn/{sha}')
    def cdn(self, oid: str) -> None:
        if self.headers.get('Authorization'):
            raise Refusal(400, message='a token was sent to another host')
        self.send_content(self.server.large[oid], Accept_Ranges='bytes')

    def send_content(self, data: bytes, **headers: str) -> None:
        """Sends a file, or the requested range of it."""
        match = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        data = self.damage(data[int(match[1]) :] if match else data)
        self.answer(data, 206 if match else 200, **headers)

    def damage(self, data: bytes) -> bytes:
        """Flips a bit if the fault is 'corrupt'."""
        if self.fault is None or self.fault.kind != 'corrupt':
            return data
        return data[:-1] + bytes([data[-1] ^ 1])
