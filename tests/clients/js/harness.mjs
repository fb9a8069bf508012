// What every script here shares. The test's arguments come as JSON in argv, and each line of stdout is one JSON object:
// what the client has seen so far (tell), the last of them its result.
export const given = JSON.parse(process.argv[2] ?? "{}");

export const tell = (seen) => process.stdout.write(`${JSON.stringify(seen)}\n`);
