// Client of SLSNet Server, for browsers and Node. It keeps no photo and writes none.

export { Client } from "./client.js";
export { overlay } from "./overlay.js";
export {
  DeadlinePassed,
  KeyRefused,
  RequestRefused,
  ServerBusy,
  ServerFailed,
  SlsnetError,
  Unreachable,
} from "./errors.js";
