// What can go wrong between client and server, as one small tree.

/** Any of them. What the server's problem document says is in its properties. */
export class SlsnetError extends Error {
  constructor(detail, { status = null, title = "", type = "about:blank", requestId = null, retryAfterMs = null, cause } = {}) {
    const about = [status && `status ${status}`, requestId && `request ${requestId}`].filter(Boolean);
    super(about.length ? `${detail} (${about.join(", ")})` : detail, { cause });
    this.name = new.target.name;
    Object.assign(this, { detail, status, title, type, requestId, retryAfterMs });
  }
}

export class KeyRefused extends SlsnetError {}
export class RequestRefused extends SlsnetError {}
export class ServerBusy extends SlsnetError {}
export class DeadlinePassed extends SlsnetError {}
export class ServerFailed extends SlsnetError {}
export class Unreachable extends SlsnetError {}

const BY_STATUS = {
  401: KeyRefused,
  403: KeyRefused,
  408: DeadlinePassed,
  429: ServerBusy,
  503: ServerBusy,
  504: DeadlinePassed,
};

/** The error that an answer means; `document` is its JSON, or null. */
export function errorOf(status, document, requestId, retryAfterMs) {
  const Kind = BY_STATUS[status] ?? (status >= 400 && status < 500 ? RequestRefused : ServerFailed);
  const said = document && typeof document === "object" ? document : {};
  return new Kind(String(said.detail || `The server answered with status ${status}.`), {
    status,
    title: String(said.title ?? ""),
    type: String(said.type ?? "about:blank"),
    requestId: String(said.request_id || requestId || "") || null,
    retryAfterMs,
  });
}
