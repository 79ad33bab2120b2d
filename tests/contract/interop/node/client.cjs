// An unmodified @grpc/grpc-js client of the server, with the published .proto files.
//   client.cjs scenarios|restart TARGET PROTO_FOLDER [ROOT_CERTIFICATE]
//   client.cjs calls TARGET PROTO_FOLDER SHARED_MEMORY_KEY
// "scenarios" runs them all and prints one JSON object: scenario -> "ok", or what went wrong. "restart" asks on and on,
// says so, and at the end of its standard input prints {"answered": number, "problems": [text]}. "calls" makes every call
// of the service and prints call -> "ok", or what went wrong.
'use strict';

const assert = require('node:assert/strict');
const fs = require('node:fs');
const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const [mode, target, protoFolder, last] = process.argv.slice(2);
const root = mode === 'calls' ? undefined : last;
const TIMEOUT_MS = 10000;
const { status } = grpc;

function loadService(file, name) {
  const options = { keepCase: true, longs: Number, defaults: true, oneofs: true, includeDirs: [protoFolder] };
  return grpc.loadPackageDefinition(loader.loadSync(file, options)).aiorch.v2[name];
}

// The same messages at the path where clients of the protocol expect them.
function atStandardPath(service) {
  const moved = {};
  for (const [name, method] of Object.entries(service.service)) {
    moved[name] = { ...method, path: method.path.replace('/aiorch.v2.', '/inference.') };
  }
  return grpc.makeGenericClientConstructor(moved, 'inference.GRPCInferenceService');
}

const credentials = root
  ? grpc.credentials.createSsl(fs.readFileSync(root))
  : grpc.credentials.createInsecure();
const limits = { 'grpc.max_receive_message_length': -1, 'grpc.max_send_message_length': -1 };
const OwnPath = loadService(path.join('aiorch', 'v2', 'inference.proto'), 'GRPCInferenceService');
const StandardPath = atStandardPath(OwnPath);

function open(options = {}, Client = StandardPath) {
  return new Client(target, credentials, { ...limits, 'grpc.use_local_subchannel_pool': 1, ...options });
}

function request(values, model = 'identity') {
  const raw = Buffer.from(Float32Array.from(values).buffer);
  return {
    model_name: model,
    inputs: [{ name: 'INPUT0', datatype: 'FP32', shape: [1, values.length] }],
    raw_input_contents: [raw],
  };
}

function values(response) {
  assert.equal(response.outputs[0].name, 'OUTPUT0');
  const raw = response.raw_output_contents[0];
  return Array.from(new Float32Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length)));
}

function infer(client, message, { deadlineMs = TIMEOUT_MS, metadata = new grpc.Metadata(), onCall } = {}) {
  return new Promise((resolve, reject) => {
    const done = (error, response) => (error ? reject(error) : resolve(response));
    const call = client.ModelInfer(message, metadata, { deadline: Date.now() + deadlineMs }, done);
    if (onCall) onCall(call);
  });
}

async function refusal(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new assert.AssertionError({ message: 'the call was answered' });
}

async function checkRight(client) {
  assert.deepEqual(values(await infer(client, request([1.5, -2]))), [1.5, -2]);
}

const scenarios = {
  async 'many calls at once, at both paths'() {
    const clients = [open(), open({}, OwnPath)];
    const calls = Array.from({ length: 200 }, (_, i) => infer(clients[i % 2], request([i, i + 0.5])));
    (await Promise.all(calls)).forEach((response, i) => assert.deepEqual(values(response), [i, i + 0.5]));
    clients.forEach((client) => client.close());
  },

  async 'large tensors'() {
    const client = open();
    const sent = Float32Array.from({ length: 1 << 21 }, (_, i) => i);
    const message = request([]);
    message.inputs[0].shape = [1, sent.length];
    message.raw_input_contents = [Buffer.from(sent.buffer)];
    const response = await infer(client, message);
    assert.equal(Buffer.compare(response.raw_output_contents[0], Buffer.from(sent.buffer)), 0);
    client.close();
  },

  async 'metadata'() {
    const client = open();
    const metadata = new grpc.Metadata();
    metadata.set('x-text', 'a b, c');
    metadata.set('x-octets-bin', Buffer.from([0, 255, 1]));
    assert.deepEqual(values(await infer(client, request([3]), { metadata })), [3]);
    client.close();
  },

  async 'an unknown model'() {
    const client = open();
    const error = await refusal(infer(client, request([1], 'n\u00f6body 100%')));
    assert.equal(error.code, status.INVALID_ARGUMENT);
    assert.equal(error.details, "Request for unknown model: 'n\u00f6body 100%' is not found");
    await checkRight(client);
    client.close();
  },

  async 'an unknown method'() {
    const client = open();
    const same = (value) => value;
    const call = (done) => client.makeUnaryRequest('/no.Such/Method', same, same, Buffer.alloc(0), done);
    const error = await refusal(new Promise((resolve, reject) => call((e, r) => (e ? reject(e) : resolve(r)))));
    assert.equal(error.code, status.UNIMPLEMENTED);
    await checkRight(client);
    client.close();
  },

  async 'a deadline'() {
    const client = open();
    const error = await refusal(infer(client, request([1], 'gate'), { deadlineMs: 100 }));
    assert.equal(error.code, status.DEADLINE_EXCEEDED);
    await checkRight(client);
    client.close();
  },

  async 'calls that are given up'() {
    const client = open();
    const promises = [];
    for (let i = 0; i < 50; i += 1) {
      promises.push(refusal(infer(client, request([i]), { onCall: (call) => call.cancel() })));
    }
    for (const error of await Promise.all(promises)) assert.equal(error.code, status.CANCELLED);
    const given = refusal(infer(client, request([1], 'gate'), { onCall: (call) => setImmediate(() => call.cancel()) }));
    assert.equal((await given).code, status.CANCELLED);
    await checkRight(client);
    client.close();
  },

  async 'a stream in turns'() {
    const client = open();
    const call = client.ModelStreamInfer({ deadline: Date.now() + TIMEOUT_MS });
    const answers = [];
    const models = ['identity', 'nobody', 'identity'];
    await new Promise((resolve, reject) => {
      call.on('error', reject);
      call.on('end', resolve);
      call.on('data', (answer) => {
        answers.push(answer);
        if (answers.length < models.length) call.write(request([answers.length], models[answers.length]));
        else call.end();
      });
      call.write(request([0], models[0]));
    });
    assert.deepEqual(values(answers[0].infer_response), [0]);
    assert.equal(answers[1].error_message, "Request for unknown model: 'nobody' is not found");
    assert.deepEqual(values(answers[2].infer_response), [2]);
    client.close();
  },

  async 'a stream of many'() {
    const client = open();
    const call = client.ModelStreamInfer({ deadline: Date.now() + TIMEOUT_MS });
    for (let i = 0; i < 100; i += 1) call.write(request([i]));
    call.end();
    let count = 0;
    for await (const answer of call) {
      assert.deepEqual(values(answer.infer_response), [count]);
      count += 1;
    }
    assert.equal(count, 100);
    client.close();
  },

  async 'compressed requests'() {
    for (const algorithm of [1, 2]) {
      const client = open({ 'grpc.default_compression_algorithm': algorithm });
      const wanted = Array.from({ length: 2000 }, (_, i) => i % 7);
      assert.deepEqual(values(await infer(client, request(wanted))), wanted);
      client.close();
    }
  },

  async 'pings that keep a connection alive'() {
    const client = open({
      'grpc.keepalive_time_ms': 10,
      'grpc.keepalive_timeout_ms': 5000,
      'grpc.keepalive_permit_without_calls': 1,
    });
    const error = await refusal(infer(client, request([1], 'gate'), { deadlineMs: 300 }));
    assert.equal(error.code, status.DEADLINE_EXCEEDED);
    await checkRight(client);
    client.close();
  },
};

async function restart() {
  const backoff = ['initial', 'min', 'max'].map((which) => [`grpc.${which}_reconnect_backoff_ms`, 100]);
  const client = open(Object.fromEntries(backoff));
  const metadata = new grpc.Metadata({ waitForReady: true });
  const told = { answered: 0, problems: [] };
  let isOver = false;
  process.stdin.on('end', () => { isOver = true; }).resume();
  await Promise.all(Array.from({ length: 16 }, async (_, caller) => {
    for (let asked = 0; !isOver; asked += 1) {
      try {
        assert.deepEqual(values(await infer(client, request([caller, asked]), { metadata })), [caller, asked]);
      } catch (error) {
        told.problems.push(String(error.stack));
      }
      told.answered += 1;
      if (told.answered === 100) console.log('going on');
    }
  }));
  await checkRight(client);
  client.close();
  console.log(JSON.stringify(told));
}

async function runScenarios() {
  const told = {};
  for (const [name, run] of Object.entries(scenarios)) {
    try {
      await run();
      told[name] = 'ok';
    } catch (error) {
      told[name] = String(error.stack);
    }
  }
  console.log(JSON.stringify(told));
}

// In an order in which each has something to do: name, request, what the answer has to show.
function listCalls(key) {
  const model = { name: 'identity' };
  const column = { model_name: 'gate' };
  const config = { ...column, parameters: { config: { string_param: '{"backend": "identity", "max_batch_size": 3}' } } };
  const same = (found, wanted) => assert.deepEqual(found, wanted);
  return [
    ['ServerLive', {}, (a) => same(a, { live: true })],
    ['ServerReady', {}, (a) => same(a, { ready: true })],
    ['ModelReady', { ...model, version: '1' }, (a) => same(a, { ready: true })],
    ['ModelReady', { name: 'nobody' }, (a) => same(a, { ready: false })],
    ['ServerMetadata', {}, (a) => assert(a.extensions.includes('statistics'))],
    ['ModelMetadata', model, (a) => same(a.inputs, [{ name: 'INPUT0', datatype: 'FP32', shape: [-1, -1] }])],
    ['ModelConfig', model, (a) => same([a.config.name, a.config.max_batch_size], ['identity', 8])],
    ['ModelStatistics', model, (a) => same(a.model_stats.map((each) => each.version), ['1'])],
    ['ModelInfer', request([1.5, -2]), (a) => same(values(a), [1.5, -2])],
    ['RepositoryModelLoad', config, (a) => same(a, {})],
    ['ModelConfig', { name: 'gate' }, (a) => same(a.config.max_batch_size, 3)],
    ['RepositoryModelUnload', column, (a) => same(a, {})],
    ['RepositoryIndex', { ready: true }, (a) => same(a.models.map((each) => each.name), ['identity'])],
    ['SystemSharedMemoryRegister', { name: 'r', key, byte_size: 64 }, (a) => same(a, {})],
    ['SystemSharedMemoryStatus', { name: 'r' }, (a) => same(a.regions.r, { name: 'r', key, offset: 0, byte_size: 64 })],
    ['SystemSharedMemoryUnregister', { name: 'r' }, (a) => same(a, {})],
    ['SystemSharedMemoryStatus', {}, (a) => same(a.regions, {})],
    ['CudaSharedMemoryRegister', { name: 'r', byte_size: 64 }, (a) => same(a.code, status.UNAVAILABLE)],
    ['CudaSharedMemoryStatus', {}, (a) => same(a.regions, {})],
    ['CudaSharedMemoryUnregister', {}, (a) => same(a, {})],
    ['TraceSetting', { settings: { trace_rate: { value: ['9'] } } }, (a) => same(a.settings.trace_rate.value, ['9'])],
    ['LogSettings', { settings: { log_verbose_level: { uint32_param: 1 } } },
      (a) => same(a.settings.log_verbose_level.uint32_param, 1)],
  ];
}

async function runCalls() {
  const client = open();
  const told = {};
  for (const [name, message, check] of listCalls(last)) {
    try {
      const options = { deadline: Date.now() + TIMEOUT_MS };
      check(await new Promise((resolve) => { client[name](message, options, (error, answer) => resolve(error || answer)); }));
      told[name] = told[name] || 'ok';
    } catch (error) {
      told[name] = String(error.stack);
    }
  }
  client.close();
  try {
    await scenarios['a stream in turns']();
    told.ModelStreamInfer = 'ok';
  } catch (error) {
    told.ModelStreamInfer = String(error.stack);
  }
  console.log(JSON.stringify(told));
}

({ calls: runCalls, restart, scenarios: runScenarios })[mode]();
