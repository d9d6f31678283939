// Asks a node for recommendations over JSON frames. Runs in a browser, in Node ≥ 22, and in Node 20 with
//   node --experimental-websocket examples/client.js [ws://host:port] [user_id]

export class Client {
  constructor(url) {
    this.next = 0;
    this.waiting = new Map();
    this.socket = new WebSocket(url, ["gmco.json"]);
    this.ready = new Promise((resolve, reject) => {
      this.socket.onopen = resolve;
      this.socket.onerror = () => reject(new Error(`cannot connect to ${url}`));
    });
    this.ready.catch(() => {}); // whoever asks gets the error; nobody else needs it
    this.socket.onmessage = (event) => {
      const frame = JSON.parse(event.data); // one reply, or an array of them
      for (const reply of Array.isArray(frame) ? frame : [frame]) {
        const waiter = this.waiting.get(reply.id);
        this.waiting.delete(reply.id);
        if (!waiter) continue;
        if (reply.error) waiter.reject(Object.assign(new Error(reply.error.message), reply.error));
        else waiter.resolve(reply);
      }
    };
    this.socket.onclose = (event) => {
      for (const waiter of this.waiting.values()) waiter.reject(new Error(`connection closed (${event.code})`));
      this.waiting.clear();
    };
  }

  // Requests are pipelined: call again without waiting. Replies come in any order.
  async ask(op, fields = {}) {
    await this.ready;
    if (this.socket.readyState !== 1) throw new Error("connection closed");
    const id = ++this.next;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.socket.send(JSON.stringify({ id, op, ...fields }));
    });
  }

  close() {
    this.socket.close();
  }
}

async function main(url = "ws://127.0.0.1:7400", userId = "1") {
  const client = new Client(url);
  try {
    await client.ask("ping");
    // Ids above 2^53 − 1 are strings in both directions.
    const answer = await client.ask("recommend", { user_id: userId, k: 5 });
    for (const hit of answer.hits) console.log(hit.score.toFixed(3), hit.media_id, hit.metadata);
    if (answer.coverage.missing.length) console.log("missing shards:", answer.coverage.missing);
  } catch (error) {
    console.error(error.code ?? "", error.message, error.field ?? "");
  } finally {
    client.close();
  }
}

if (typeof process !== "undefined") main(...process.argv.slice(2));
