// Numbers and times as people read them.

export const number = (value, digits = 3) =>
  value === null || value === undefined ? "-" : value.toFixed(digits);

export const whole = (value) => (value === null || value === undefined ? "-" : Math.round(value).toLocaleString("en"));

export const percent = (share) => (share === null || share === undefined ? "-" : `${Math.round(100 * share)}%`);

export const gigabytes = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GB`;

export const rate = (value) => (value === null || value === undefined ? "-" : value === 0 ? "0" : value.toExponential(1));

/** The start of a digest, enough to tell it from others. */
export const shortDigest = (digest) => `${digest.slice(0, 12)}...`;

/** 4000 -> "1 h 06 min"; below a minute in seconds. */
export function duration(seconds) {
  const all = Math.max(0, Math.round(seconds));
  if (all < 60) return `${all} s`;
  if (all < 3600) return `${Math.floor(all / 60)} min ${String(all % 60).padStart(2, "0")} s`;
  return `${Math.floor(all / 3600)} h ${String(Math.floor((all % 3600) / 60)).padStart(2, "0")} min`;
}

/** A moment in the browser's zone, with the zone. */
const withZone = new Intl.DateTimeFormat("en-GB", {
  year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit", second: "2-digit",
  hour12: false, timeZoneName: "short",
});
export function moment(at) {
  if (!at) return "-";
  const parts = Object.fromEntries(withZone.formatToParts(at * 1000).map(({ type, value }) => [type, value]));
  return `${parts.year}-${parts.month}-${parts.day} ${parts.hour}:${parts.minute}:${parts.second} ${parts.timeZoneName}`;
}

const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
export const clockTime = (at) => clock.format(at * 1000);
